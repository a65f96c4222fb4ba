"""Shards without pixels: what a driver does for a shard, without what workers do for it.

A source that lists any number of shards, and stand-ins for the two steps that run on workers. They
write fragments of one row and return results as the real ones do, so that the plan, Ray Data, the
ledger, the commits and the tables are those of a real build with as many shards.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arrag_runtime.format.ids import image_id, patch_ids
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.specs import KeySpec, TokenizerSpec
from arrag_runtime.tokenizers import load_tokenizer
from pipeline import build as build_module
from pipeline.build import BuildReport, build
from pipeline.building import run_shards as ray_run
from pipeline.building.database import create_database, resolve_database
from pipeline.building.shard_worker import WorkerSettings
from schemas.records import ImageRecord, Listing, RecordedShard, Reject, Shard
from schemas.settings.build import BuildSettings
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings
from schemas.tables import images_schema, patches_schema
from stages.tables.committer import IMAGES, PATCHES, ShardResult, table_paths, write_fragments

NAME = "blank"


class BlankSource:
    """So many shards of one input each, which nobody reads."""

    name = NAME

    def __init__(self, shards: int) -> None:
        self._shards = shards

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """All shards that are not done."""
        done = {r.shard.id for r in recorded if r.inputs is not None}
        every = (blank_shard(number) for number in range(self._shards))
        return Listing([shard for shard in every if shard.id not in done])

    def read(self, shard: Shard) -> Iterator[ImageRecord | Reject]:
        """Nothing: the stand-in for the reading step does not ask."""
        yield from ()


def blank_shard(number: int) -> Shard:
    """A shard with an id of its own and a member as long as that of a list of addresses."""
    shard_id = hashlib.sha256(str(number).encode()).hexdigest()[:16]
    return Shard(NAME, shard_id, (f"0123456789abcdef:{number * 1_000_000}:1000000",))


def blank_result(shard: str, layout: Layout, spec: TokenizerSpec, keys: KeySpec) -> ShardResult:
    """A shard of one picture and one patch, written as fragments that are not committed yet."""
    image = image_id(shard, 0)
    row = {"image_id": image, "source": NAME, "shard": shard, "key": "k", "width": 1, "height": 1}
    row |= {"sha256": "0" * 64, "split": "database", "tokens": [0] * spec.positions}
    images = pa.Table.from_pylist([row], schema=images_schema(spec, latents=False))
    columns = [
        pa.array(patch_ids(np.array([image]), np.array([0])).reshape(-1)),
        fixed_lists(np.zeros((1, keys.neighborhood.size), np.uint16)),
        pa.array(np.zeros(1, np.uint16)),
    ]
    patches = pa.table(columns, schema=patches_schema(spec, keys))
    paths = table_paths(layout, keys)
    fragments = {
        IMAGES: write_fragments(paths[IMAGES], images),
        PATCHES: write_fragments(paths[PATCHES], patches),
    }
    return ShardResult(shard, NAME, 1, 1, 1, 0, 1, {}, fragments, {"read": 0.0, "encode": 0.0})


def blank_writer(layout: Layout) -> tuple[KeySpec, Callable[[str], ShardResult]]:
    """A new database as a build makes it; its keys, and what writes a blank shard to it by id."""
    manifest, codes = resolve_database(
        layout, BuildSettings(database=layout.root, source=SourceSettings(name=NAME))
    )
    create_database(layout, manifest, codes)
    keys, spec = manifest.keys, manifest.tokenizer
    return keys, lambda shard: blank_result(shard, layout, spec, keys)


class EncodeNothing:
    """In place of `EncodeWorker`: no model, no pictures."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._keys, self._layout = settings.keys, Layout(settings.database)
        self._spec = load_tokenizer(settings.tokenizer, settings.tokenizer_weights).spec

    def __call__(self, table: pa.Table) -> pa.Table:
        shards = table["shard"].to_pylist()
        written = (blank_result(shard, self._layout, self._spec, self._keys) for shard in shards)
        results = [result.to_json() for result in written]
        columns = [shards, results, [None] * len(shards)]
        names = ("shard", "result", "error")
        return pa.table([pa.array(column, pa.string()) for column in columns], names=list(names))


def build_blank(
    database: str,
    shards: int,
    workers: int = 2,
    mark: str | None = None,
    progress: Callable[[int, BuildReport], None] = lambda _total, _report: None,
) -> BuildReport:
    """The real build over blank shards. mark: a file that gets the time of the first one's start."""

    def read_nothing(table: pa.Table, settings: WorkerSettings) -> pa.Table:
        if mark is not None:
            with contextlib.suppress(FileExistsError), Path(mark).open("x") as file:
                file.write(str(time.time()))
        return table

    steps: dict[tuple[Any, str], Any] = {
        (ray_run, "read_shard"): read_nothing,
        (ray_run, "EncodeWorker"): EncodeNothing,
        (build_module, "open_source"): lambda _settings: BlankSource(shards),
        (build_module, "locate_source"): lambda settings: settings,
    }
    kept = {(module, name): getattr(module, name) for module, name in steps}
    for (module, name), stand_in in steps.items():
        setattr(module, name, stand_in)
    try:
        settings = BuildSettings(
            database=database,
            source=SourceSettings(name=NAME),
            resources=RayResources(workers=workers),
        )
        return build(settings, progress)
    finally:
        for (module, name), own in kept.items():
            setattr(module, name, own)


def as_line(fields: dict[str, Any]) -> str:
    """One line that a parent process reads back."""
    return "RESULT " + json.dumps(fields)
