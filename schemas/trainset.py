"""A training set: captions, token grids, and the tokens retrieved for every position.

It is a folder: `rows.lance`, `codebook.npy` and `manifest.json`, which is written last. Exported, it
is one Arrow file with both in its metadata, which can be read where Lance is not installed.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from schemas.errors import BadInputError, IncompatibleError
from schemas.specs import KeySpec, TokenizerSpec

FORMAT = 1
ROWS, MANIFEST, CODEBOOK = "rows.lance", "manifest.json", "codebook.npy"
"""The parts of the folder; the last two are also the metadata keys of an exported file."""
SETTINGS = b"trainset"
"""The metadata key of a table's schema that holds what its rows were made with."""


@dataclass(frozen=True)
class TrainsetManifest:
    """What a training set was made with. Rows of different settings are not mixed.

    k: retrieved tokens a position; index, table_version: what was searched; pictures: where they
    come from ("heldout", "database", or a source and its inputs); images: rows, 0 while it is made.
    """

    tokenizer: TokenizerSpec
    keys: KeySpec
    k: int
    index: str
    table_version: int
    pictures: str
    images: int = 0

    def to_json(self) -> str:
        """As metadata and `manifest.json` hold it."""
        fields = asdict(self) | {"format": FORMAT, "keys": self.keys.to_json()}
        return json.dumps(fields, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> "TrainsetManifest":
        """What `to_json` wrote. Raises BadInputError for another object found at `where`."""
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop("format", None) != FORMAT:
                raise IncompatibleError(
                    f"training set {where} is of another format than {FORMAT}; make it anew with"
                    " `arrag-db trainset`"
                )
            fields["tokenizer"] = TokenizerSpec(**fields["tokenizer"])
            return TrainsetManifest(**fields | {"keys": KeySpec.from_json(fields["keys"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"{where} holds no training set ({error}); make it anew with `arrag-db trainset`"
            ) from error


def trainset_schema(manifest: TrainsetManifest) -> pa.Schema:
    """A row a picture. tokens: the grid in raster order; neighbors: for each position its k retrieved

    tokens, nearest first, `MISSING` (65535) where there are fewer.
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
