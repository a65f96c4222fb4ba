"""A training set: captions, token grids, and the tokens retrieved for every position.

It is a folder: `rows.lance`, `codebook.npy` and `manifest.json`, which is written last. Exported,
it is one Arrow file with both in its metadata, which can be read where Lance is not installed.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.location import exists, in_store, join, read_bytes, resolved_place
from arrag_runtime.format.manifest import Layout, read_codebook
from arrag_runtime.format.specs import Floats, KeySpec, TokenizerSpec

_Take = Callable[[list[int]], pa.Table]
_FORMAT = 1
TRAINSET_ROWS, TRAINSET_MANIFEST, TRAINSET_CODEBOOK = "rows.lance", "manifest.json", "codebook.npy"
"""The parts of the folder; the last two are also the metadata keys of an exported file."""
SETTINGS = b"trainset"
"""The metadata key of a table's schema that holds what its rows were made with."""


@dataclass(frozen=True)
class TrainsetManifest:
    """What a training set was made with. Rows of different settings are not mixed."""

    tokenizer: TokenizerSpec
    keys: KeySpec
    k: int
    """Retrieved tokens per position."""
    index: str
    """The index that was searched."""
    table_version: int
    """The version of the table that it was made from."""
    pictures: str
    """Where they come from: "heldout", "database", or a source and its inputs."""
    images: int = 0
    """Rows; 0 while it is made."""

    def to_json(self) -> str:
        """As metadata and `manifest.json` hold it."""
        fields = asdict(self) | {"format": _FORMAT, "keys": self.keys.to_json()}
        return json.dumps(fields, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> "TrainsetManifest":
        """What `to_json` wrote. Raises BadInputError for another object found at `where`."""
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop("format", None) != _FORMAT:
                raise IncompatibleError(
                    f"training set {where} is of another format than {_FORMAT}; make it anew with"
                    " `arrag-db trainset`"
                )
            fields["tokenizer"] = TokenizerSpec(**fields["tokenizer"])
            fields["keys"] = KeySpec.from_json(fields["keys"])
            return TrainsetManifest(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"{where} holds no training set ({error}); make it anew with `arrag-db trainset`"
            ) from error


def trainset_schema(manifest: TrainsetManifest) -> pa.Schema:
    """A row per picture.

    tokens: the grid in raster order; neighbors: for each position its k retrieved tokens, nearest
    first, `MISSING` (65535) where there are fewer.
    """
    positions = manifest.tokenizer.positions
    return pa.schema(
        [
            pa.field("image_id", pa.int64(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("caption", pa.string(), nullable=False),
            pa.field("tokens", pa.list_(pa.uint16(), positions), nullable=False),
            pa.field("neighbors", pa.list_(pa.uint16(), positions * manifest.k), nullable=False),
        ],
        metadata={SETTINGS: manifest.to_json().encode()},
    )


@dataclass(frozen=True)
class Examples:
    """Some rows of a training set."""

    captions: list[str]
    """B texts."""
    tokens: npt.NDArray[np.uint16]
    """uint16 [B, P]."""
    neighbors: npt.NDArray[np.uint16]
    """uint16 [B, P, K], `MISSING` for none."""


class TrainingSet:
    """An opened training set; `TrainingSet.open` finds out which kind a path is."""

    def __init__(
        self, manifest: TrainsetManifest, codebook: Floats, ids: pa.ChunkedArray, take: _Take
    ) -> None:
        self.manifest, self.codebook = manifest, codebook
        self._order = np.argsort(ids.to_numpy(), kind="stable")
        self._take = take

    @staticmethod
    def open(path: Path | str) -> "TrainingSet":
        """A training set. Raises BadInputError where there is none, or an unfinished one."""
        place = resolved_place(path)
        if not in_store(place) and Path(place).is_file():
            return _open_file(Path(place))
        if not exists(place):
            raise BadInputError(
                f"no training set at '{path}'; make one with `arrag-db trainset`, or give the file"
                " that it exported"
            )
        if not exists(join(place, TRAINSET_MANIFEST)):
            raise BadInputError(
                f"no complete training set at '{path}'; give `arrag-db trainset` again to finish it"
            )
        return _open_folder(place)

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, numbers: Sequence[int]) -> Examples:
        """The examples of these numbers, 0 ≤ number < len, in the order asked for."""
        table = self._take(self._order[list(numbers)].tolist())
        tokens, neighbors = list_values(table["tokens"]), list_values(table["neighbors"])
        neighbors = neighbors.reshape(*tokens.shape, self.manifest.k)
        return Examples(table["caption"].to_pylist(), tokens, neighbors)


def _open_folder(folder: str) -> TrainingSet:
    try:
        import lance
    except ImportError as error:
        raise BadInputError(
            f"reading the folder '{folder}' needs Lance, which is not installed; export it with"
            " `arrag-db trainset --export FILE.arrow`, and give that file"
        ) from error
    manifest = TrainsetManifest.from_json(read_bytes(join(folder, TRAINSET_MANIFEST)), folder)
    dataset = lance.dataset(join(folder, TRAINSET_ROWS))
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
    described = metadata.get(TRAINSET_MANIFEST.encode(), b"")
    manifest = TrainsetManifest.from_json(described, f"'{path}'")
    codebook: Floats = np.load(io.BytesIO(metadata[TRAINSET_CODEBOOK.encode()]))
    return TrainingSet(manifest, codebook, table["image_id"], table.take)
