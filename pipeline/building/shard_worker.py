"""What runs on the cluster: a task that reads or downloads a shard, an actor that encodes it.

In: rows that are attempts at shards, as Arrow tables, since Ray Data hands those over without
conversion. Out: rows with a result or an error. Neither raises for what is wrong with a shard.
"""

import logging
import pickle
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from arrag_runtime.format.errors import ShardError
from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.specs import KeySpec
from arrag_runtime.tokenizers import load_tokenizer
from schemas.records import Attempt, LinkRecord, ShardInput, pack_records, unpack_records
from schemas.settings.download import DownloadSettings
from schemas.settings.source import SourceSettings
from schemas.tables import REJECTS_SCHEMA
from stages.download.download_links import download_links
from stages.encode.encode_images import EncodeSettings, encode_shard
from stages.encode.extract_patches import extract_patches
from stages.removal.suppression import read_suppressions, suppress
from stages.sources import open_source, source_kind
from stages.tables.committer import (
    IMAGES,
    PATCHES,
    REJECTS,
    ShardResult,
    table_paths,
    write_fragments,
)

_SHARD_ROW = pa.schema([("shard", pa.string()), ("attempt", pa.binary())])
"""An attempt as it travels to a worker: its shard's id, and all of it as a pickle."""
_ANSWER_ROW = pa.schema([(name, pa.string()) for name in ("shard", "result", "error")])
"""What comes back: a `ShardResult` as JSON, or an error."""


@dataclass(frozen=True)
class WorkerSettings:
    """Everything a worker needs to know besides its shard."""

    database: str
    """The database's place, the same on all nodes."""
    source: SourceSettings
    tokenizer: str
    tokenizer_weights: str | None
    device: str
    precision: str
    compile: bool
    """Whether the encoder is compiled by torch."""
    keys: KeySpec
    encode: EncodeSettings
    threads: int
    """CPU threads of one encoder."""
    download: DownloadSettings


def shard_rows(attempts: Sequence[Attempt]) -> list[pa.Table]:
    """A table of one row per attempt, as `read_shard` takes them."""
    rows = [{"shard": a.shard.id, "attempt": pickle.dumps(a)} for a in attempts]
    return [pa.Table.from_pylist([row], schema=_SHARD_ROW) for row in rows]


def read_shard(table: pa.Table, settings: WorkerSettings) -> pa.Table:
    """Shard rows with their inputs packed into one binary value each."""
    inputs, errors, seconds = [], [], []
    for row in table.to_pylist():
        started = time.perf_counter()
        packed, error = pa.py_buffer(b""), None
        try:
            packed = pack_records(_inputs(pickle.loads(row["attempt"]), settings))
        except Exception as raised:
            error = _describe(raised)
        inputs.append(_one_binary(packed))
        errors.append(error)
        seconds.append(time.perf_counter() - started)
    table = table.append_column("inputs", pa.chunked_array(inputs, pa.large_binary()))
    table = table.append_column("error", pa.array(errors, pa.string()))
    return table.append_column("read_seconds", pa.array(seconds, pa.float64()))


def _inputs(attempt: Attempt, settings: WorkerSettings) -> Iterator[ShardInput]:
    """The attempt's inputs in order, with links downloaded, and kept where that is asked for.

    What is on the list of removed pictures is suppressed: before it is downloaded where its address
    or hash is known, and else by its bytes, before it is kept.
    """
    suppressions = read_suppressions(Layout(settings.database))
    items = open_source(settings.source).read(attempt.shard)
    if attempt.rows:
        items = _only(items, attempt)
    fresh = suppress(items, suppressions)
    return download_links(fresh, settings.download, attempt, suppressions=suppressions)


def _only(
    items: Iterator[ShardInput | LinkRecord], attempt: Attempt
) -> Iterator[ShardInput | LinkRecord]:
    """The items of the rows that are tried again. Raises ShardError where one is gone."""
    missing = set(attempt.rows)
    for item in items:
        if item.row in missing:
            missing.discard(item.row)
            yield item
    if missing:
        raise ShardError(
            f"shard {attempt.shard.id} has no row {min(missing)} any more; its input has changed"
        )


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
        if not source_kind(settings.source.name).grids:
            self._tokenizer.setup(
                settings.device, precision=settings.precision, compile=settings.compile
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for index in range(table.num_rows):
            shard, error = (table[name][index].as_py() for name in ("shard", "error"))
            answer = {"shard": shard, "result": None, "error": error}
            if error is None:
                try:
                    answer["result"] = self._encode(table.slice(index, 1)).to_json()
                except Exception as raised:
                    answer["error"] = _describe(raised)
            rows.append(answer)
        return pa.Table.from_pylist(rows, schema=_ANSWER_ROW)

    def _encode(self, row: pa.Table) -> ShardResult:
        settings, spec = self._settings, self._tokenizer.spec
        layout = Layout(settings.database)
        if not exists(layout.manifest):
            # Fragments would go to a folder of this node's own, where no table finds them.
            raise ShardError(
                f"node {socket.gethostname()} does not see the database at {layout.root}; put it"
                " where all nodes of the cluster do: on a shared file system or in a bucket"
            )
        attempt: Attempt = pickle.loads(row["attempt"][0].as_py())
        shard = attempt.shard
        encoded = encode_shard(
            self._tokenizer,
            unpack_records(row["inputs"][0].as_buffer()),
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
        of_attempt = {"shard": shard.id, "attempt": attempt.number}
        rejects = [of_attempt | vars(reject) for reject in encoded.rejects]
        tables = {
            PATCHES: patches,
            REJECTS: pa.Table.from_pylist(rejects, schema=REJECTS_SCHEMA),
            IMAGES: encoded.images_table(spec, shard),
        }
        paths = table_paths(layout, settings.keys)
        fragments = {name: write_fragments(paths[name], tables[name]) for name in tables}
        return ShardResult(
            shard=shard.id,
            source=shard.source,
            attempt=attempt.number,
            inputs=0 if attempt.rows else encoded.inputs,
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
            retried=attempt.rows,
        )


def _describe(error: Exception) -> str:
    """One line for people; the traceback goes to the worker's log."""
    logging.getLogger(__name__).warning("%s", traceback.format_exc())
    return f"{type(error).__name__}: {error}"
