"""A database of captioned pictures with made-up grids, indexed: nothing is encoded."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from arrag_runtime.format.manifest import DatabaseManifest, EncoderSettings, Layout, write_codebook
from arrag_runtime.format.specs import TokenizerSpec, key_spec, normalised
from pipeline.index import index
from schemas.records import ImageRecord, Shard
from schemas.settings.index import IndexSettings
from schemas.tables import REJECTS_SCHEMA
from stages.encode.encode_images import EncodedImage, EncodedShard
from stages.encode.extract_patches import extract_patches
from stages.tables.committer import (
    Committer,
    ShardResult,
    create_tables,
    table_paths,
    write_fragments,
)

CODES, DIMENSION = 48, 8
SPEC = TokenizerSpec("toy", 96, 6, 5, CODES, DIMENSION, "made up", "0" * 64)
SQUARE = TokenizerSpec("toy", 112, 7, 7, CODES, DIMENSION, "made up", "0" * 64)
"""Grids as a Janus model draws them."""
KEYS = key_spec("causal-1", "skip", "codebook")
CODEBOOK = normalised(np.random.default_rng(1).normal(size=(CODES, DIMENSION)))
SHARD = Shard("toy", f"{7 << 40:016x}", ("all",))


def _image(row: int) -> EncodedImage:
    """Picture `row`; every third is held out, those from 20 on are copies of the first ones."""
    original = row % 20
    caption = None if row in (1, 4) else f"picture {row}"
    url = f"http://pictures/{row}.jpg"
    record = ImageRecord(row, f"{row}.jpg", b"", caption=caption, url=url, licence="CC0-1.0")
    sha256 = hashlib.sha256(str(original).encode()).hexdigest()
    return EncodedImage(record, 96, 96, sha256, held_out=original % 3 == 0)


def make_captioned(root: Path, *, held_out: bool = True, spec: TokenizerSpec = SPEC) -> Path:
    """A database of 26 pictures, six of them copies, two without a caption; its folder."""
    layout = Layout(root)
    create_tables(layout, spec, KEYS)
    write_codebook(layout, CODEBOOK)
    rng = np.random.default_rng(3)
    originals = rng.integers(0, CODES, (20, spec.grid_height, spec.grid_width)).astype(np.uint16)
    images = tuple(_image(row) for row in range(26))
    if not held_out:
        images = tuple(replace(image, held_out=False) for image in images)
    tokens = originals[[row % 20 for row in range(26)]]
    encoded = EncodedShard(images, tokens, None, (), 0.0, None)
    kept = encoded.in_database()
    ids = encoded.image_ids(SHARD)
    tables = {
        "patches": extract_patches(spec, KEYS, ids[kept], tokens[kept]),
        "rejects": REJECTS_SCHEMA.empty_table(),
        "images": encoded.images_table(spec, SHARD),
    }
    paths = table_paths(layout, KEYS)
    fragments = {name: write_fragments(paths[name], table) for name, table in tables.items()}
    held, patches = int((~kept).sum()), tables["patches"].num_rows
    committer = Committer(layout, KEYS)
    committer.plan([SHARD])
    committer.commit(ShardResult(SHARD.id, SHARD.source, 1, 26, 26, held, patches, {}, fragments))
    encoder = EncoderSettings("cpu", "float32", 1)
    DatabaseManifest(spec, None, encoder, KEYS, 0.3 if held_out else 0.0).write(layout)
    index(root, IndexSettings(kind="flat"))
    return root
