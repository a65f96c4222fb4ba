"""What runs on the cluster: a task that reads a shard, an actor that encodes and writes it.

In: rows that are shards, as Arrow tables, since Ray Data hands those over without conversion. Out:
rows with a result or an error; neither function raises for what is wrong with a shard.
"""

import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from schemas.errors import ShardError
from schemas.manifest import Layout
from schemas.records import (
    GridRecord,
    ImageRecord,
    LinkRecord,
    Reject,
    Shard,
    SourceSettings,
    pack_records,
    unpack_records,
)
from schemas.specs import KeySpec
from schemas.tables import REJECTS_SCHEMA
from stages.encode_images import EncodeSettings, encode_shard
from stages.extract_patches import extract_patches
from stages.patch_table import ShardResult, table_paths, write_fragments
from stages.sources import GRID_SOURCES, open_source
from stages.suppress import read_suppressed, without_removed
from stages.tokenizers import load_tokenizer


@dataclass(frozen=True)
class WorkerSettings:
    """Everything a worker needs to know besides its shard."""

    database: str
    source: SourceSettings
    tokenizer: str
    tokenizer_weights: str | None
    device: str
    precision: str
    compile: bool
    keys: KeySpec
    encode: EncodeSettings
    threads: int


FIRST_ATTEMPT = 1
"""A shard that is tried again because it failed left nothing, so this is still its first."""

SHARD_ROW = pa.schema(
    [("shard", pa.string()), ("source", pa.string()), ("members", pa.list_(pa.string()))]
)


def read_shard(table: pa.Table, settings: WorkerSettings) -> pa.Table:
    """Shard rows with their inputs packed into one binary value each."""
    inputs, errors, seconds = [], [], []
    for row in table.to_pylist():
        shard = Shard(row["source"], row["shard"], tuple(row["members"]))
        started = time.perf_counter()
        packed, error = pa.py_buffer(b""), None
        try:
            removed = read_suppressed(Layout(settings.database))
            items = _fetched(open_source(settings.source).read(shard))
            packed = pack_records(without_removed(items, removed))
        except Exception as raised:
            error = _describe(raised)
        inputs.append(_one_binary(packed))
        errors.append(error)
        seconds.append(time.perf_counter() - started)
    table = table.append_column("inputs", pa.chunked_array(inputs, pa.large_binary()))
    table = table.append_column("error", pa.array(errors, pa.string()))
    return table.append_column("read_seconds", pa.array(seconds, pa.float64()))


def _fetched(
    items: Iterator[ImageRecord | LinkRecord | GridRecord | Reject],
) -> Iterator[ImageRecord | GridRecord | Reject]:
    """The items, none of which may be a link yet."""
    for item in items:
        if isinstance(item, LinkRecord):
            raise ShardError(f"row {item.row} is an address, and addresses cannot be fetched yet")
        yield item


def _one_binary(buffer: pa.Buffer) -> pa.LargeBinaryArray:
    """An array of one value that is this buffer, without copying it."""
    offsets = pa.py_buffer(np.array([0, buffer.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, buffer])


class EncodeWorker:
    """Holds the tokenizer; turns one packed shard into written fragments and a result."""

    def __init__(self, settings: WorkerSettings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._measured = False
        self._tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_weights)
        if settings.source.name not in GRID_SOURCES:
            self._tokenizer.setup(
                settings.device, precision=settings.precision, compile=settings.compile
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for index in range(table.num_rows):
            row = {name: table[name][index].as_py() for name in ("shard", "source", "error")}
            answer = {"shard": row["shard"], "result": None, "error": row["error"]}
            if row["error"] is None:
                try:
                    answer["result"] = self._encode(table.slice(index, 1)).to_json()
                except Exception as error:
                    answer["error"] = _describe(error)
            rows.append(answer)
        names = ("shard", "result", "error")
        return pa.Table.from_pylist(rows, schema=pa.schema([(n, pa.string()) for n in names]))

    def _encode(self, row: pa.Table) -> ShardResult:
        settings, spec = self._settings, self._tokenizer.spec
        members = tuple(row["members"][0].as_py())
        shard = Shard(row["source"][0].as_py(), row["shard"][0].as_py(), members)
        inputs = unpack_records(row["inputs"][0].as_buffer())
        encoded = encode_shard(
            self._tokenizer,
            inputs,
            settings.encode,
            measure_agreement=not self._measured and settings.precision != "float32",
        )
        self._measured |= encoded.agreement is not None
        started = time.perf_counter()
        kept = encoded.in_database()
        patches = extract_patches(
            spec,
            settings.keys,
            encoded.image_ids(shard)[kept],
            encoded.tokens[kept],
            encoded.latents[kept] if encoded.latents is not None else None,
        )
        rejects = pa.Table.from_pylist(
            [
                {"shard": shard.id, "attempt": FIRST_ATTEMPT, "row": r.row, "key": r.key}
                | {"url": r.url, "stage": r.stage, "reason": r.reason, "detail": r.detail}
                for r in encoded.rejects
            ],
            schema=REJECTS_SCHEMA,
        )
        paths = table_paths(Layout(settings.database), settings.keys)
        tables = {
            "patches": patches,
            "rejects": rejects,
            "images": encoded.images_table(spec, shard),
        }
        fragments = {name: write_fragments(paths[name], tables[name]) for name in tables}
        return ShardResult(
            shard=shard.id,
            source=shard.source,
            attempt=FIRST_ATTEMPT,
            inputs=encoded.inputs,
            images=len(encoded.images),
            heldout=int(np.count_nonzero(~kept)),
            patches=patches.num_rows,
            rejects=dict(encoded.reasons),
            fragments=fragments,
            seconds={
                "read": row["read_seconds"][0].as_py(),
                "encode": encoded.seconds,
                "write": time.perf_counter() - started,
            },
            agreement=encoded.agreement,
        )


def _describe(error: Exception) -> str:
    """One line for people; the traceback goes to the worker's log."""
    logging.getLogger(__name__).warning("%s", traceback.format_exc())
    return f"{type(error).__name__}: {error}"
