"""What a database and an index say of themselves.

A manifest is written last and whole, so that its existence means that what it describes is
complete.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.location import exists, join, read_bytes, resolved_place, write_bytes
from arrag_runtime.format.specs import Floats, KeySpec, TokenizerSpec

_FORMAT = 1
PRECISIONS = ("float32", "bfloat16")
INDEX_FILE, IDS_FILE, TOKENS_FILE = "index.faiss", "patch_ids.npy", "next_tokens.npy"
"""The files of a flat or ivfpq index; ids and next tokens in the order of its entries."""
LEFT_OUT_FILE = "left_out.npy"
"""int64, ascending: the pictures of the table that an index leaves out, removed ones or copies."""


class Layout:
    """Where things stand in a database: a folder, or a prefix in a bucket. Places are text."""

    def __init__(self, database: str | Path) -> None:
        """Raises BadInputError for a store that is not known."""
        self.database = database
        self.root = root = resolved_place(database)
        self.manifest = join(root, "manifest.json")
        self.codebook = join(root, "codebook.npy")
        self.leases = join(root, "leases")
        self.ledger = join(root, "shards.lance")
        self.images = join(root, "images.lance")
        self.rejects = join(root, "rejects.lance")
        self.removed = join(root, "removed.lance")
        self.receipts = join(root, "receipts")
        self.indexes = join(root, "index")

    def patches(self, keys: KeySpec) -> str:
        return join(self.root, "patches", f"{keys.name}.lance")

    def index(self, name: str) -> str:
        return join(self.indexes, name)


@dataclass(frozen=True)
class EncoderSettings:
    """How the grids of a database were made; grids of different settings are not mixed.

    Precision and batch size change a few token ids, and so may the kind of device.
    """

    device: str
    precision: str
    batch_size: int


@dataclass(frozen=True)
class DatabaseManifest:
    """A database's own description."""

    tokenizer: TokenizerSpec
    tokenizer_weights: str | None
    """The file that they were read from, None for the tokenizer's own."""
    encoder: EncoderSettings
    keys: KeySpec
    hold_out: float
    """The share of pictures that is kept for measuring, without patches."""
    sources: tuple[str, ...] = ()
    """By name, those that it was built from."""
    runs: tuple[dict[str, Any], ...] = ()
    """What each build used and took."""

    @property
    def patches_per_image(self) -> int:
        """How many positions of a picture have a key."""
        spec = self.tokenizer
        return self.keys.neighborhood.positions(spec.grid_height, spec.grid_width).size

    def write(self, layout: Layout) -> None:
        """Write `manifest.json`, whole or not at all."""
        _write(layout.manifest, self)

    @staticmethod
    def read(layout: Layout) -> "DatabaseManifest":
        """The manifest of the database at `layout`. Raises BadInputError where there is none."""
        if not exists(layout.manifest):
            raise BadInputError(
                f"no database at {layout.database} (no manifest.json); build one with"
                f" `arrag-db build --db {layout.database}`, or name another with --db"
            )
        with _read(layout.manifest, "use the version of arrag-db that wrote it") as fields:
            fields["tokenizer"] = TokenizerSpec(**fields["tokenizer"])
            fields["encoder"] = EncoderSettings(**fields["encoder"])
            lists = {"sources": tuple(fields["sources"]), "runs": tuple(fields["runs"])}
            return DatabaseManifest(**fields | lists)


@dataclass(frozen=True)
class IndexManifest:
    """An index's own description: what it was made from, how, and how good it is."""

    name: str
    kind: str
    """One of "codebook", "ivfpq" and "flat"."""
    index_key: str
    """faiss' factory string, empty for a codebook index."""
    keys: KeySpec
    table_version: int
    """The version of the patches table that it was made from."""
    mark: int
    """The highest fragment of the table that is in it, so that a later one is new."""
    count: int
    """Keys, identical ones included."""
    entries: int
    """What is stored of the keys."""
    nprobe: int | None
    """The lists that a search visits; None without lists."""
    code_bytes_per_key: float
    resident_bytes_per_key: float
    ms_per_query: float
    recall_at_10: float
    certificate: dict[str, Any]
    """What was measured against exact search, at every nprobe that was tried."""
    left_out: int = 0
    """Pictures whose keys were in the table and were not taken, their ids in `LEFT_OUT_FILE`."""
    parts: tuple[str, ...] = ()
    """The folders of a codebook index."""
    weights: tuple[float, ...] | None = None
    """One per offset, None for equal ones."""
    temperature: float | None = None
    """The one that was fitted with the weights."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What it was asked to be, so that a grown table is indexed likewise."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """autofaiss' own scores."""

    def write(self, folder: str | Path) -> None:
        """Write `manifest.json` into the index's folder, whole or not at all."""
        _write(join(str(folder), "manifest.json"), self)

    @staticmethod
    def read(folder: str | Path) -> "IndexManifest":
        """The manifest in this folder. Raises BadInputError where there is none."""
        path = join(str(folder), "manifest.json")
        if not exists(path):
            raise BadInputError(
                f"no complete index at {folder}; build it with `arrag-db index"
                f" --db {str(folder).rpartition('/index/')[0] or 'DB'}`"
            )
        with _read(path, "index again") as fields:
            weights = None if fields["weights"] is None else tuple(fields["weights"])
            return IndexManifest(**fields | {"parts": tuple(fields["parts"]), "weights": weights})


def _write(path: str, manifest: DatabaseManifest | IndexManifest) -> None:
    write_json(path, asdict(manifest) | {"format": _FORMAT, "keys": manifest.keys.to_json()})


@contextmanager
def _read(path: str, otherwise: str) -> Iterator[dict[str, Any]]:
    """The fields of a manifest; one that is missing or unknown becomes one line about the file.

    otherwise: what to do about another format.
    """
    fields = read_json(path)
    if fields.pop("format", None) != _FORMAT:
        raise IncompatibleError(f"{path} is of another format than {_FORMAT}; {otherwise}")
    try:
        fields["keys"] = KeySpec.from_json(fields["keys"])
        yield fields
    except (KeyError, TypeError) as error:
        raise BadInputError(
            f"{path} lacks or has unknown fields ({error}); restore it or build anew"
        ) from error


def write_json(path: str, fields: dict[str, Any]) -> None:
    """Write an object so that a reader sees the old file or the whole new one."""
    write_bytes(path, (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: str) -> dict[str, Any]:
    """The object in a file. Raises BadInputError when it is damaged."""
    try:
        fields = json.loads(read_bytes(path))
    except ValueError as error:
        raise BadInputError(f"{path} is damaged: {error}; restore it or build anew") from error
    if not isinstance(fields, dict):
        raise BadInputError(f"{path} holds no JSON object; restore it or build anew")
    return fields


def write_codebook(layout: Layout, codes: Floats) -> None:
    """Keep the normalised codebook [V, d] beside the tables, so that reading needs no weights."""
    file = io.BytesIO()
    np.save(file, codes)
    write_bytes(layout.codebook, file.getvalue())


def read_codebook(layout: Layout) -> Floats:
    """The normalised codebook float32 [V, d] of a database."""
    if not exists(layout.codebook):
        raise BadInputError(f"{layout.codebook} is missing; run `arrag-db build` on it again")
    try:
        codes: Floats = np.load(io.BytesIO(read_bytes(layout.codebook)))
    except (OSError, EOFError, ValueError) as error:
        raise BadInputError(
            f"{layout.codebook} is damaged; restore it, or delete it and run `arrag-db build` again"
        ) from error
    return codes
