"""Pictures that were taken out of a database: what every search asks before it answers.

In: the list `removed.lance` as any process may extend it at any time. Out: the ids it hides. Lance
is loaded only where there is a list.
"""

import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.errors import ArragError
from schemas.manifest import Layout
from schemas.tables import Ids, contains

SETTLED_NS = 1_000_000_000
"""A folder changed less than this ago may change again within the same tick of its clock."""


class Tombstones:
    """The removed pictures of one database. `refresh` before a search, then ask `hides`."""

    def __init__(self, layout: Layout) -> None:
        self._table = Path(layout.removed)
        self._versions = self._table / "_versions"
        self._seen: int | None = None
        self.ids: Ids = np.empty(0, np.int64)
        self.refresh()

    def refresh(self) -> bool:
        """Read the list again if it has changed, and say whether it had. Costs a stat if not.

        Raises ArragError when the list is there and cannot be read: nothing is found rather than
        something that was removed.
        """
        changed = _changed(self._versions)
        if changed is None or changed == self._seen:
            return False
        # Read before the stamp is old enough, the list is read once more at the next refresh.
        settled = time.time_ns() - changed > SETTLED_NS
        before, self.ids = self.ids, _read(self._table)
        self._seen = changed if settled else None
        return not np.array_equal(before, self.ids)

    def hides(self, image_ids: Ids) -> npt.NDArray[np.bool_]:
        """For each of these pictures, an array of any shape, whether it was taken out."""
        return contains(self.ids, image_ids)


def _changed(folder: Path) -> int | None:
    """When the folder of versions changed last, in nanoseconds; None where there is no list."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(table: Path) -> Ids:
    import lance

    try:
        rows = lance.dataset(table).to_table(columns=["image_id"], filter="image_id IS NOT NULL")
    except (OSError, ValueError) as error:
        raise ArragError(
            f"the list of removed pictures {table} cannot be read"
            f" ({str(error).splitlines()[0]}); restore it before searching"
        ) from error
    ids: Ids = np.unique(rows["image_id"].to_numpy())
    return ids
