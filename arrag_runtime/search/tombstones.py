"""Tombstones: the removed pictures of a database, which every search hides.

In: the list `removed.lance`, which any process may extend at any time. Out: the ids that it hides.
Lance is loaded only where there is a list.
"""

import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.ids import Ids, contains
from arrag_runtime.format.location import exists, in_store
from arrag_runtime.format.manifest import Layout

_SETTLED_NS = 1_000_000_000
"""A folder changed less than this ago may change again within the same tick of its clock."""
STORE_SECONDS = 10.0
"""A list in a bucket, which costs more to ask than a folder, is looked at this often at most."""


class Tombstones:
    """The tombstones of one database: `refresh` before a search, then ask `hides`."""

    def __init__(self, layout: Layout) -> None:
        self._table = layout.removed
        self._seen: int | None = None
        self._looked = -math.inf
        self.ids: Ids = np.empty(0, np.int64)
        """The hidden pictures, ascending."""
        self.refresh()

    def refresh(self) -> bool:
        """Read the list again if it has changed, and say whether it had. Costs one stat if not.

        In a bucket a change is seen after `STORE_SECONDS` at most. Raises ArragError when the list
        is there and cannot be read: better no answer than one with a removed picture.
        """
        before = self.ids
        if in_store(self._table):
            if time.monotonic() - self._looked >= STORE_SECONDS:
                self._looked = time.monotonic()
                if exists(self._table):
                    self.ids, self._seen = _read(self._table, self._seen, self.ids)
        elif (changed := _changed(Path(self._table) / "_versions")) not in (None, self._seen):
            # Read before the stamp is old enough, the list is read once more at the next refresh.
            settled = time.time_ns() - changed > _SETTLED_NS
            self.ids = _read(self._table)[0]
            self._seen = changed if settled else None
        return not np.array_equal(before, self.ids)

    def hides(self, image_ids: Ids) -> npt.NDArray[np.bool_]:
        """For each of these pictures, an array of any shape, whether it is hidden."""
        return contains(self.ids, image_ids)


def _changed(folder: Path) -> int | None:
    """When the folder of versions changed last, in nanoseconds; None where there is no list."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(table: str, known: int | None = None, ids: Ids | None = None) -> tuple[Ids, int]:
    """The ids on the list and its version; `ids` where that is the `known` one."""
    import lance

    try:
        listed = lance.dataset(table)
        version = int(listed.version)
        if ids is None or version != known:
            rows = listed.to_table(columns=["image_id"], filter="image_id IS NOT NULL")
            ids = np.unique(rows["image_id"].to_numpy())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArragError(
            f"the list of removed pictures {table} cannot be read ({reason}); restore it before"
            " searching"
        ) from error
    return ids, version
