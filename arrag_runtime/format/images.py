"""Reading pictures' rows: grids, and where a picture came from."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import NO_IMAGE, Ids, contains
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.location import exists

_GRIDS = ("tokens", "latents")


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
    """The images table of a database, at its newest version.

    `sample` and `captioned` leave out pictures that were removed.
    """

    def __init__(self, path: str, hidden: Ids | None = None) -> None:
        """hidden: the ids of removed pictures, ascending."""
        if not exists(path):
            raise BadInputError(f"no images at {path}; build them with `arrag-db build`")
        import lance

        self._dataset = lance.dataset(path)
        self._hidden = np.empty(0, np.int64) if hidden is None else hidden
        self.version: int = self._dataset.version
        self.count: int = self._dataset.count_rows()

    def rows(self, image_ids: Iterable[int]) -> dict[int, ImageRow]:
        """The rows of these pictures by id; unknown ids are left out."""
        table = self._select(image_ids, [field.name for field in fields(ImageRow)])
        return {row["image_id"]: ImageRow(**row) for row in table.to_pylist()}

    def grids(self, image_ids: Iterable[int], height: int) -> dict[int, npt.NDArray[np.uint16]]:
        """The token grids uint16 [h, w] of these pictures by id."""
        table = self._select(image_ids, ("image_id", "tokens"))
        tokens = list_values(table["tokens"])
        grids = tokens.reshape(len(tokens), height, tokens.shape[1] // height)
        return dict(zip(table["image_id"].to_pylist(), grids, strict=True))

    def copies(self, hashes: Iterable[str]) -> dict[str, list[int]]:
        """The ids of the pictures with patches whose original bytes have these hashes."""
        wanted = ", ".join(f"'{sha256}'" for sha256 in sorted(set(hashes)))
        if not wanted:
            return {}
        found: dict[str, list[int]] = {}
        columns = ["sha256", "image_id"]
        which = f"sha256 IN ({wanted}) AND split = 'database'"
        table = self._dataset.to_table(columns=columns, filter=which)
        for row in table.to_pylist():
            found.setdefault(row["sha256"], []).append(row["image_id"])
        return found

    def copies_of(self, hashes: Sequence[str]) -> Ids:
        """For each hash the ids that `copies` finds, int64 [N, M], filled up with `NO_IMAGE`."""
        found = self.copies(hashes)
        own = [found.get(sha256, []) for sha256 in hashes]
        widest = max([1, *map(len, own)])
        padded = [ids + [NO_IMAGE] * (widest - len(ids)) for ids in own]
        return np.array(padded, np.int64).reshape(-1, widest)

    def sample(self, split: str, count: int, *, seed: int) -> tuple[Ids, npt.NDArray[np.uint16]]:
        """The ids [N], ascending, and flat grids [N, h · w] of up to `count` pictures of a split."""
        every = self._shown(f"split = '{split}'")
        rng = np.random.default_rng(seed)
        chosen = every if len(every) <= count else np.sort(rng.choice(every, count, replace=False))
        if not len(chosen):
            return chosen, np.empty((0, 0), np.uint16)
        table = self._select(chosen.tolist(), ("image_id", "tokens"))
        order = np.argsort(table["image_id"].to_numpy())
        return chosen, list_values(table["tokens"])[order]

    def captioned(self, split: str) -> tuple[Ids, int]:
        """The ids int64 [N] of a split's pictures with a caption, and how many have none."""
        told = self._shown(f"split = '{split}' AND caption != ''")
        return told, len(self._shown(f"split = '{split}'")) - len(told)

    def schema(self, columns: Iterable[str]) -> pa.Schema:
        """The schema of some columns."""
        return pa.schema([self._dataset.schema.field(name) for name in columns])

    def batches(
        self, columns: list[str], size: int = 4096, where: str | None = None
    ) -> Iterator[pa.RecordBatch]:
        """All rows, or those of a Lance filter, some columns, in blocks.

        Raises BadInputError, naming the columns, for a filter that cannot be used.
        """
        try:
            scanner = self._dataset.scanner(columns=columns, batch_size=size, filter=where)
            yield from scanner.to_batches()
        except ValueError as error:
            if where is None:
                raise
            known = [name for name in self._dataset.schema.names if name not in _GRIDS]
            raise BadInputError(
                f"--where '{where}' cannot be used: {_reason(error)}; the columns are"
                f" {', '.join(known)}"
            ) from error

    def _shown(self, where: str) -> Ids:
        """The ids, ascending, of the pictures of a Lance filter that were not removed."""
        ids = self._dataset.to_table(columns=["image_id"], filter=where)["image_id"]
        return np.setdiff1d(ids.to_numpy(), self._hidden)

    def _select(self, image_ids: Iterable[int], columns: Iterable[str]) -> pa.Table:
        wanted = ", ".join(str(int(image)) for image in image_ids)
        where = f"image_id IN ({wanted})" if wanted else "false"
        return self._dataset.to_table(columns=list(columns), filter=where)


def _reason(error: Exception) -> str:
    """What Lance says of a filter, without the places in its own source."""
    text = str(error).splitlines()[0].partition(", /")[0].partition(". Valid fields")[0]
    return re.sub(r"^(Invalid user input: |Schema error: |Error tokenizing statement: )+", "", text)


def duplicate_images(images: ImageTable, hidden: Ids | None = None) -> Ids:
    """The ids of pictures that are a copy of one with a lower id, sorted.

    Copies have the same original bytes by their sha256. Pictures among `hidden` (sorted ids) count
    as absent. The hashes are streamed twice: first the beginnings of all, 8 bytes per picture, then
    in full those of the few pictures whose beginnings meet.
    """
    gone = np.empty(0, np.int64) if hidden is None else hidden
    blocks = [hashes[:, 0].copy() for _, hashes in _hashes(images, gone)]
    starts = np.sort(np.concatenate([np.empty(0, np.uint64), *blocks]))
    met = np.unique(starts[1:][starts[1:] == starts[:-1]])
    if not len(met):
        return np.empty(0, np.int64)
    rows = []
    for ids, hashes in _hashes(images, gone):
        at = np.minimum(np.searchsorted(met, hashes[:, 0]), len(met) - 1)
        meets = met[at] == hashes[:, 0]
        rows.append(np.column_stack([ids[meets].astype(np.uint64), hashes[meets]]))
    # Equal hashes together, the lowest id first.
    found = np.concatenate(rows)
    found = found[np.lexsort(found.T)]
    copy = (found[1:, 1:] == found[:-1, 1:]).all(axis=1)
    return np.sort(found[1:][copy, 0].astype(np.int64))


def _hashes(images: ImageTable, gone: Ids) -> Iterator[tuple[Ids, npt.NDArray[np.uint64]]]:
    """Ids int64 [N] and hashes uint64 [N, 4] of the pictures that are not gone, in blocks."""
    for batch in images.batches(["image_id", "sha256"], size=65_536):
        text = "".join(batch.column("sha256").to_pylist())
        hashes = np.frombuffer(bytes.fromhex(text), ">u8").reshape(batch.num_rows, 4)
        ids = batch.column("image_id").to_numpy()
        stays = ~contains(gone, ids)
        yield ids[stays], hashes[stays].astype(np.uint64)
