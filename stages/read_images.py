"""Reading pictures' rows: grids, and where a picture came from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import BadInputError
from schemas.location import exists
from schemas.tables import Ids, list_values

COLUMNS = ("image_id", "key", "source", "caption", "url", "licence", "split", "sha256")


@dataclass(frozen=True)
class ImageRow:
    """A picture's row without its grid."""

    image_id: int
    key: str
    source: str
    caption: str | None
    url: str | None
    licence: str | None
    split: str
    sha256: str


class ImageTable:
    """The images table of a database, at its newest version."""

    def __init__(self, path: str) -> None:
        if not exists(path):
            raise BadInputError(f"no images at {path}; build them with `arrag-db build`")
        self._dataset = lance.dataset(path)
        self.count: int = self._dataset.count_rows()

    def rows(self, image_ids: Iterable[int]) -> dict[int, ImageRow]:
        """The rows of these pictures by id; unknown ids are left out."""
        table = self._select(image_ids, COLUMNS)
        return {row["image_id"]: ImageRow(**row) for row in table.to_pylist()}

    def grids(self, image_ids: Iterable[int], height: int) -> dict[int, npt.NDArray[np.uint16]]:
        """The token grids uint16 [h, w] of these pictures by id."""
        table = self._select(image_ids, ("image_id", "tokens"))
        tokens = list_values(table["tokens"])
        return {
            image: grid.reshape(height, -1)
            for image, grid in zip(table["image_id"].to_pylist(), tokens, strict=True)
        }

    def copies(self, hashes: Iterable[str]) -> dict[str, list[int]]:
        """The ids of the pictures whose original bytes have these hashes, several for copies."""
        wanted = ", ".join(f"'{sha256}'" for sha256 in sorted(set(hashes)))
        if not wanted:
            return {}
        found: dict[str, list[int]] = {}
        table = self._dataset.to_table(
            columns=["sha256", "image_id"], filter=f"sha256 IN ({wanted})"
        )
        for row in table.to_pylist():
            found.setdefault(row["sha256"], []).append(row["image_id"])
        return found

    def sample(self, split: str, count: int, *, seed: int) -> tuple[Ids, npt.NDArray[np.uint16]]:
        """Up to `count` pictures of a split: their ids [N], ascending, and flat grids [N, h · w]."""
        ids = self._dataset.to_table(columns=["image_id"], filter=f"split = '{split}'")
        every = np.sort(ids["image_id"].to_numpy())
        rng = np.random.default_rng(seed)
        chosen = every if len(every) <= count else np.sort(rng.choice(every, count, replace=False))
        if not len(chosen):
            return chosen, np.empty((0, 0), np.uint16)
        table = self._select(chosen.tolist(), ("image_id", "tokens"))
        order = np.argsort(table["image_id"].to_numpy())
        return chosen, list_values(table["tokens"])[order]

    def captioned(self, split: str) -> pa.Table:
        """The ids (image_id) of the pictures of a split that have a caption."""
        wanted = f"split = '{split}' AND caption IS NOT NULL AND caption != ''"
        return self._dataset.to_table(columns=["image_id"], filter=wanted)

    def count_of(self, split: str) -> int:
        """The number of pictures of a split."""
        return int(self._dataset.count_rows(filter=f"split = '{split}'"))

    def batches(self, columns: list[str], size: int = 4096) -> Iterator[pa.RecordBatch]:
        """All rows, some columns, in blocks."""
        yield from self._dataset.scanner(columns=columns, batch_size=size).to_batches()

    def _select(self, image_ids: Iterable[int], columns: Iterable[str]) -> pa.Table:
        wanted = ", ".join(str(int(image)) for image in image_ids)
        if not wanted:
            return self._dataset.schema.empty_table().select(list(columns))
        return self._dataset.to_table(columns=list(columns), filter=f"image_id IN ({wanted})")
