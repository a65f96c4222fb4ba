"""The Arrow schemas of the tables and what their rows mean, and which pictures are held out."""

import pyarrow as pa

from arrag_runtime.format.specs import KeySpec, TokenizerSpec


def images_schema(spec: TokenizerSpec, *, latents: bool) -> pa.Schema:
    """One row per picture. tokens: the grid in raster order; latents: float16, in the same order.

    width, height: of the upright original, 0 where only its grid was given; sha256: of its bytes,
    or of the grid's.
    """
    fields = [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("metadata", pa.string()),
        pa.field("tokens", pa.list_(pa.uint16(), spec.positions), nullable=False),
    ]
    if latents:
        values = spec.positions * spec.dimension
        fields.append(pa.field("latents", pa.list_(pa.float16(), values), nullable=False))
    return pa.schema(fields)


def patches_schema(spec: TokenizerSpec, keys: KeySpec) -> pa.Schema:
    """One row per position that has a key, `key` in reading order of the offsets."""
    if keys.space == "codebook":
        key = pa.list_(pa.uint16(), keys.neighborhood.size)
    else:
        key = pa.list_(pa.float16(), keys.neighborhood.size * spec.dimension)
    return pa.schema(
        [
            pa.field("patch_id", pa.int64(), nullable=False),
            pa.field("key", key, nullable=False),
            pa.field("next_token", pa.uint16(), nullable=False),
        ]
    )


REJECTS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

REMOVED_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        *(pa.field(name, pa.string()) for name in ("sha256", "url", "key", "source", "split")),
        pa.field("when", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("receipt", pa.string(), nullable=False),
    ]
)
"""What was removed. A row with an image_id is a tombstone: every search hides that picture at once.

A sha256 (of the original bytes) or url is a suppression: what has it is kept out of later builds. It
is null where other pictures that stay have it too. A row without an image_id only suppresses.
"""

LEDGER_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        *(pa.field(name, pa.int32()) for name in ("inputs", "images", "heldout")),
        pa.field("patches", pa.int64()),
        pa.field("rejects", pa.int32()),
        pa.field("versions", pa.map_(pa.string(), pa.int64())),
        pa.field("fragments", pa.map_(pa.string(), pa.int64())),
        pa.field("members", pa.list_(pa.string())),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""The ledger. A shard is first `planned` (attempt 0, with its members), then `done` (attempt 1).

A later attempt takes rejects of a shard again, and is `planned` and then `done` too. Its `members`
are the rows that it takes, as text; `inputs` is 0, since it brings none; `images`, `heldout` and
`patches` are what it added; `rejects` is the change in the number of open rejects, 0 or less: rows
rejected again minus rows taken. So for every row, and for all sums, inputs = images + rejects.
The table of rejects is only appended to: a reject is open when its attempt is done and no later
done attempt of its shard took its row (`pipeline.building.plan_shards`).

`versions` are the table versions its rows were committed at, `fragments` each table's highest
fragment then: on the next start only later fragments are examined.
A compaction writes, before it touches a table, a row `compacting` (of no shard) and a row `removed`
for every shard that loses pictures: `images`, `heldout` and `patches` are negative, `members` the
ids of the pictures. So the sums over `done` and `removed` rows are what the tables hold, and
inputs = images + rejects + pictures removed. A row `compacted` with the new marks ends it; while
there is one `compacting` row more than `compacted` ones, it was interrupted.
"""


def is_held_out(sha256_hex: str, share: float) -> bool:
    """Whether the picture with this hash belongs to the held-out `share` (0..1).

    The hash of the original file decides, so copies of a picture fall on one side whatever
    their names, and the decision is the same in every source, build and machine.
    """
    return int(sha256_hex[:16], 16) / 2**64 < share
