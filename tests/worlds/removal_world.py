"""A small database with pictures, patches, rejects and an index, made without encoding anything."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from arrag_runtime.format.location import in_store
from arrag_runtime.format.manifest import DatabaseManifest, EncoderSettings, Layout, write_codebook
from arrag_runtime.format.specs import TokenizerSpec, key_spec, normalised
from schemas.records import ImageRecord, Reject, Shard
from schemas.tables import REJECTS_SCHEMA, is_held_out
from stages.encode.encode_images import EncodedImage, EncodedShard
from stages.encode.extract_patches import extract_patches
from stages.tables.committer import (
    Committer,
    ShardResult,
    create_tables,
    table_paths,
    write_fragments,
)
from stages.tables.deletion import create_removed_list
from stages.tables.ledger import read_ledger

SPEC = TokenizerSpec("toy", 112, 7, 7, 24, 4, "centre crop", "0" * 64)
KEYS = key_spec("causal-1", "skip", "codebook")
PER_IMAGE = 30
"""Rows 1..6 and columns 1..5 of the grid have all four neighbours."""
HELD_OUT = 0.2
PER_SHARD = 6


def picture_bytes(number: int) -> bytes:
    """What stands for the original file of a picture."""
    return f"the bytes of picture {number}".encode()


def sha256(number: int) -> str:
    """The hash of those bytes."""
    return hashlib.sha256(picture_bytes(number)).hexdigest()


def make_database(root: str | Path, shards: int = 3) -> Layout:
    """Shards of six pictures and one reject. Pictures 0, 6, 12, … of site a.org, others of b.org."""
    layout = Layout(root)
    create_tables(layout, SPEC, KEYS)
    if in_store(layout.root):
        create_removed_list(layout)
    write_codebook(layout, normalised(np.random.default_rng(1).normal(size=(24, 4))))
    encoder = EncoderSettings("cpu", "float32", 1)
    DatabaseManifest(SPEC, None, encoder, KEYS, HELD_OUT).write(layout)
    for shard in range(shards):
        add_shard(layout, shard, range(shard * PER_SHARD, (shard + 1) * PER_SHARD))
    return layout


def shard_of(number: int) -> Shard:
    """The shard of this number."""
    return Shard("toy", f"{(number + 1) << 40:016x}", (f"member {number}",))


def write_shard(
    layout: Layout, number: int, contents: range | list[int], *, again: bool = False
) -> ShardResult:
    """Write a shard's fragments, uncommitted: a picture for each of `contents`, and a reject.

    Equal contents give equal bytes and grids, under other keys and addresses. again: a second
    attempt at the reject of six pictures, which makes a picture of it.
    """
    first_row = PER_SHARD if again else 0
    shard = shard_of(number)
    images = tuple(
        EncodedImage(
            ImageRecord(
                row=row,
                key=f"{number}/{row}.jpg",
                data=b"",
                caption=f"caption of picture {content}",
                url=f"http://{'a' if content % PER_SHARD == 0 else 'b'}.org/{number}/{row}.jpg",
            ),
            640,
            480,
            sha256(content),
            is_held_out(sha256(content), HELD_OUT),
        )
        for row, content in enumerate(contents, start=first_row)
    )
    grids = [np.random.default_rng(c).integers(0, 24, (7, 7)).astype(np.uint16) for c in contents]
    bad = Reject(len(images), f"{number}/bad.jpg", "decode", "empty", "zero bytes")
    rejects = () if again else (bad,)
    encoded = EncodedShard(images, np.stack(grids), None, rejects, 0.0, None)
    kept = encoded.in_database()
    reject_rows = [
        {"shard": shard.id, "attempt": 1, "row": r.row, "key": r.key, "url": r.url}
        | {"stage": r.stage, "reason": r.reason, "detail": r.detail}
        for r in rejects
    ]
    tables = {
        "patches": extract_patches(
            SPEC, KEYS, encoded.image_ids(shard)[kept], encoded.tokens[kept]
        ),
        "rejects": pa.Table.from_pylist(reject_rows, schema=REJECTS_SCHEMA),
        "images": encoded.images_table(SPEC, shard),
    }
    paths = table_paths(layout, KEYS)
    return ShardResult(
        shard.id,
        shard.source,
        2 if again else 1,
        inputs=0 if again else len(images) + 1,
        images=len(images),
        heldout=int(np.count_nonzero(~kept)),
        patches=tables["patches"].num_rows,
        rejects={} if again else {"empty": 1},
        retried=(PER_SHARD,) if again else (),
        fragments={name: write_fragments(paths[name], tables[name]) for name in tables},
    )


def add_shard(layout: Layout, number: int, contents: range | list[int]) -> None:
    """Plan, write and commit a shard."""
    committer = Committer(layout, KEYS)
    committer.recover(read_ledger(layout))
    committer.plan([shard_of(number)])
    committer.commit(write_shard(layout, number, contents))
