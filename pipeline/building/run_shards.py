"""Ray Data over rows that are shards.

Tasks on CPUs read a shard and end in encoded files; an actor takes a whole shard, decodes, encodes
and writes its fragments. What comes back to the driver is one small row per shard, a result or an
error. The number of shards in flight is bounded by the pools, and their bytes by `in_flight_bytes`.
"""

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from pipeline.building.shard_worker import EncodeWorker, WorkerSettings, read_shard, shard_rows
from pipeline.resources.malloc import return_free_memory
from pipeline.resources.ray_session import EncoderPool
from schemas.records import Attempt
from schemas.settings.resources import RayResources
from stages.tables.committer import ShardResult, clean_versions

_READ_CPUS = 0.25
"""Declared for a task that reads: it waits for disks and networks most of the time."""
_TRACE = 0.001
"""What a step asks of the resource that keeps it to nodes of one kind."""
_WHOLE: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""How rows are taken: as the Arrow tables that they are in, without conversion."""
_SHARDS_AT_A_TIME = 256
"""Ray Data keeps a few kilobytes in the driver for every shard that it was ever given."""


@dataclass(frozen=True)
class ShardFailure:
    """The id of a shard that did not come through, and why, in one line."""

    shard: str
    error: str


class VersionCleaner:
    """Cleans tables of old versions on some worker, one at a time, while the driver goes on.

    What is asked for while a cleaning is under way is left to the next.
    """

    def __init__(self) -> None:
        self._task: Any = ray.remote(clean_versions).options(num_cpus=0)
        self._running: Any = None

    def __call__(self, paths: Sequence[str]) -> None:
        """See `Committer` in stages.tables. A cleaning that fails costs nothing but space."""
        if self._running is None or ray.wait([self._running], timeout=0)[0]:
            self._running = self._task.remote(list(paths))


def run_shards(
    attempts: Sequence[Attempt],
    settings: WorkerSettings,
    resources: RayResources,
    pool: EncoderPool,
) -> Iterator[ShardResult | ShardFailure]:
    """Run shards, one attempt each, in any order; every one of them is answered for, once.

    A shard whose worker died, or whose task raised, comes back as a failure.
    """
    for start in range(0, len(attempts), _SHARDS_AT_A_TIME):
        # A finished run of Ray Data is a ring of references, which Python alone is slow to free.
        gc.collect()
        return_free_memory()
        few = attempts[start : start + _SHARDS_AT_A_TIME]
        yield from _run_few(few, settings, resources, pool)


def _run_few(
    attempts: Sequence[Attempt],
    settings: WorkerSettings,
    resources: RayResources,
    pool: EncoderPool,
) -> Iterator[ShardResult | ShardFailure]:
    # Ray 2.60 has no other way to say how often a task may be tried.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.log_internal_stack_trace_to_stdout = False
    context.execution_options.preserve_order = False
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=resources.in_flight_bytes
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    most = min(pool.largest, len(attempts))
    encode_cpus = resources.threads - 2 * _READ_CPUS
    # The type of a function on Arrow tables is one that ray.data's own hints do not know.
    read: Any = read_shard
    encoded = (
        ray.data.from_arrow(shard_rows(attempts))
        .map_batches(
            read,
            fn_kwargs={"settings": settings},
            **_WHOLE,
            compute=TaskPoolStrategy(size=min(most + 1, len(attempts))),
            num_cpus=_READ_CPUS,
            **_only_on(resources.read_resource),
        )
        .map_batches(
            EncodeWorker,
            fn_constructor_kwargs={"settings": settings},
            **_WHOLE,
            compute=ActorPoolStrategy(
                min_size=min(pool.smallest, most), max_size=most, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=encode_cpus,
            num_gpus=1 if resources.gpus else 0,
            # Ray would run a shard that kills its worker again without end.
            max_task_retries=0,
            **_only_on(resources.encode_resource),
        )
    )
    missing = {attempt.shard.id for attempt in attempts}
    reason = "its worker died (out of memory, or killed); see Ray's logs"
    try:
        answers: Any = encoded.iter_batches(prefetch_batches=0, **_WHOLE)
        for row in (row for answer in answers for row in answer.to_pylist()):
            if row["shard"] not in missing:
                continue
            missing.discard(row["shard"])
            if row["error"] is None:
                yield ShardResult.from_json(row["result"])
            else:
                yield ShardFailure(row["shard"], row["error"])
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
    for shard in sorted(missing):
        yield ShardFailure(shard, reason)


def _only_on(resource: str | None) -> dict[str, Any]:
    """Ray's options that keep a step to nodes that declare a resource."""
    return {"resources": {resource: _TRACE}} if resource else {}
