"""Reading a training set: the folder that `arrag-db trainset` made, or its export to one Arrow file.

In: a path. Out: examples by number, in the order of their image ids, so that the same numbers are
the same examples however the set was made. The Arrow file is memory-mapped and needs no Lance.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import BadInputError
from schemas.location import exists, in_store, join, normalised, read_bytes
from schemas.manifest import Layout, read_codebook
from schemas.specs import Floats
from schemas.tables import list_values
from schemas.trainset import CODEBOOK, MANIFEST, ROWS, TrainsetManifest

Take = Callable[[list[int]], pa.Table]


@dataclass(frozen=True)
class Examples:
    """captions: B; tokens: uint16 [B, P]; neighbors: uint16 [B, P, K], `MISSING` for none."""

    captions: list[str]
    tokens: npt.NDArray[np.uint16]
    neighbors: npt.NDArray[np.uint16]


class TrainingSet:
    """An opened training set; `TrainingSet.open` finds out which kind a path is."""

    def __init__(
        self, manifest: TrainsetManifest, codebook: Floats, ids: pa.ChunkedArray, take: Take
    ) -> None:
        self.manifest, self.codebook = manifest, codebook
        self._order = np.argsort(ids.to_numpy(), kind="stable")
        self._take = take

    @staticmethod
    def open(path: Path | str) -> "TrainingSet":
        """A training set. Raises BadInputError where there is none, or an unfinished one."""
        place = normalised(path)
        if not in_store(place) and Path(place).is_file():
            return _open_file(Path(place))
        if not exists(place):
            raise BadInputError(
                f"no training set at '{path}'; make one with `arrag-db trainset`, or give the file"
                " that it exported"
            )
        if not exists(join(place, MANIFEST)):
            raise BadInputError(
                f"no complete training set at '{path}'; give `arrag-db trainset` again to finish it"
            )
        return _open_folder(place)

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, numbers: Sequence[int]) -> Examples:
        """The examples of these numbers, 0 ≤ number < len, in the order asked for."""
        table = self._take(self._order[list(numbers)].tolist())
        neighbors = list_values(table["neighbors"])
        return Examples(
            table["caption"].to_pylist(),
            list_values(table["tokens"]),
            neighbors.reshape(len(neighbors), -1, self.manifest.k),
        )


def _open_folder(folder: str) -> TrainingSet:
    try:
        import lance
    except ImportError as error:
        raise BadInputError(
            f"reading the folder '{folder}' needs Lance, which is not installed; export it with"
            " `arrag-db trainset --export FILE.arrow`, and give that file"
        ) from error
    manifest = TrainsetManifest.from_json(read_bytes(join(folder, MANIFEST)), folder)
    dataset = lance.dataset(join(folder, ROWS))
    ids = dataset.to_table(columns=["image_id"])["image_id"]
    return TrainingSet(manifest, read_codebook(Layout(folder)), ids, dataset.take)


def _open_file(path: Path) -> TrainingSet:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise BadInputError(
            f"'{path}' holds no training set ({str(error).splitlines()[0]}); give the file that"
            " `arrag-db trainset --export` wrote"
        ) from error
    metadata = table.schema.metadata or {}
    manifest = TrainsetManifest.from_json(metadata.get(MANIFEST.encode(), b""), f"'{path}'")
    codebook: Floats = np.load(io.BytesIO(metadata[CODEBOOK.encode()]))
    return TrainingSet(manifest, codebook, table["image_id"], table.take)
