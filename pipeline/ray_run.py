"""Ray Data over rows that are shards.

CPU tasks read a shard and end in encoded files; an actor takes a whole shard, decodes, encodes and
writes its fragments. What comes back to the driver is one small row a shard, a result or an error.
The number of shards in flight is bounded by the pools, and their bytes by `in_flight_bytes`.
"""

import gc
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from pipeline.memory import one_arena, return_free_memory
from pipeline.shard_worker import EncodeWorker, WorkerSettings, read_shard, shard_rows
from schemas.errors import ArragError, BadInputError
from schemas.records import Attempt
from stages.patch_table import ShardResult, clean_versions

READ_CPUS = 0.25
"""Declared for a task that reads: it waits for disks and networks most of the time."""


@dataclass(frozen=True)
class RayResources:
    """What the run may use. `address` None starts an embedded cluster that ends with the run.

    workers: encode actors, each with `threads` CPU threads (0: one actor a GPU, else one a core);
    gpus: GPUs for them in all, one an actor. With `autoscale` these are upper bounds: what the
    cluster lacks now may join later, and the pool of encoders grows to it.
    read_resource, encode_resource: names of custom resources; reading and downloading, and
    encoding, run on nodes that declare them.
    """

    address: str | None = None
    workers: int = 0
    threads: int = 1
    gpus: int = 0
    autoscale: bool = False
    read_resource: str | None = None
    encode_resource: str | None = None
    in_flight_bytes: int = 4 << 30


@dataclass(frozen=True)
class ShardFailure:
    """A shard that did not come through, and why."""

    shard: str
    error: str


@dataclass(frozen=True)
class EncoderPool:
    """How many encode actors to begin with, and how many there may be when nodes have joined."""

    smallest: int
    largest: int


@contextmanager
def ray_cluster(resources: RayResources) -> Iterator[None]:
    """Connect to the cluster at `address`, or start an embedded one for as long as this lasts.

    A Ray session that already runs in this process is used and left alone.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray would otherwise announce a changed default on every start without a GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers have the priority of the command (`nice arrag-db build`), not the lowest there is.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # An arena of memory for each thread made encoders grow with the number of shards.
    if "MALLOC_ARENA_MAX" not in os.environ:
        os.environ["MALLOC_ARENA_MAX"] = "1"
        one_arena()
    # The driver forks to start Ray's own programs, none of which touches Lance.
    warnings.filterwarnings("ignore", "lance is not fork-safe")
    # Ray's C++ side reports harmless details of actor creation as errors on the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if resources.address is not None:
        _require_reachable(resources.address)
    try:
        with _silent_stderr():
            if resources.address is None:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=resources.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if resources.address is None:
            raise ArragError(f"cannot start Ray on this machine: {reason}") from error
        raise BadInputError(
            f"cannot reach a Ray cluster at '{resources.address}': {reason}; check the address,"
            " RAY_AUTH_MODE and the token (docs/cluster.md), or leave --ray out for an embedded one"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Knock at HOST:PORT, since Ray itself would wait for minutes at a closed door."""
    if address.startswith(("http://", "https://")):
        raise BadInputError(
            f"--ray (or RAY_ADDRESS) {address} is where jobs are submitted to; submit this command"
            f" with `ray job submit --address {address} -- …`, or name HOST:PORT of the cluster"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise BadInputError(
            f"nothing answers at --ray {address} ({error}); check that the cluster runs, or leave"
            " --ray out for an embedded one"
        ) from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's C++ side writes to file descriptor 2 while it starts; errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def encoder_pool(resources: RayResources) -> EncoderPool:
    """The encode actors to run, checked against what the cluster declares.

    Raises BadInputError for more than there is, unless the cluster is said to grow (`autoscale`).
    """
    every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in every if node["Alive"]]
    for option, name in (
        ("--read-resource", resources.read_resource),
        ("--encode-resource", resources.encode_resource),
    ):
        if name and not resources.autoscale and not any(node.get(name) for node in nodes):
            raise BadInputError(
                f"{option} {name}, but no node of the Ray cluster declares it; start nodes with"
                f" --resources '{{\"{name}\": 1}}', or pass --autoscale if they join later"
            )
    name = resources.encode_resource
    encoding = [node for node in nodes if not name or node.get(name)]
    gpus = int(sum(node.get("GPU", 0) for node in encoding))
    cpus = int(sum(node.get("CPU", 0) for node in encoding))
    wanted = resources.gpus or resources.workers or max(1, cpus // resources.threads)
    if resources.autoscale:
        there = gpus if resources.gpus else cpus // resources.threads
        return EncoderPool(max(1, min(wanted, there)), wanted)
    if resources.gpus > gpus:
        raise BadInputError(
            f"--gpus {resources.gpus}, but the Ray cluster declares {gpus}; start it with more,"
            " pass a smaller --gpus, or --autoscale if more join later"
        )
    largest = max((node.get("CPU", 0) for node in encoding), default=0)
    if wanted * resources.threads > cpus or resources.threads > largest:
        raise BadInputError(
            f"{wanted} workers of {resources.threads} threads need more than the cluster's {cpus}"
            f" CPUs ({int(largest)} on its largest node); pass fewer --workers or --threads"
        )
    return EncoderPool(wanted, wanted)


def _of(resource: str | None) -> dict[str, Any]:
    """Ray's options that keep a step to nodes that declare a resource: a trace of it is asked."""
    return {"resources": {resource: TRACE}} if resource else {}


TRACE = 0.001


class VersionCleaner:
    """Cleans tables of old versions on some worker, one after the other, while the driver goes on.

    What is asked for beside a cleaning that is under way is left to the next.
    """

    def __init__(self) -> None:
        self._task: Any = ray.remote(clean_versions).options(num_cpus=0)
        self._running: Any = None

    def __call__(self, paths: Sequence[str]) -> None:
        """See `stages.patch_table.Committer`. A cleaning that fails costs nothing but space."""
        if self._running is None or ray.wait([self._running], timeout=0)[0]:
            self._running = self._task.remote(list(paths))


def run_shards(
    attempts: Sequence[Attempt],
    settings: WorkerSettings,
    resources: RayResources,
    pool: EncoderPool,
) -> Iterator[ShardResult | ShardFailure]:
    """Run shards, one attempt each, in any order; every one of them is answered for, once.

    A shard whose worker died, or whose task raised, comes back as a failure. Ray Data keeps a few
    kilobytes in the driver for every shard it was ever given, so it gets `WINDOW` of them at a time.
    """
    for start in range(0, len(attempts), WINDOW):
        # A finished run of Ray Data is a ring of references, which Python alone is slow to free.
        gc.collect()
        return_free_memory()
        yield from _run_window(attempts[start : start + WINDOW], settings, resources, pool)


WINDOW = 256


def _run_window(
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
    encode_cpus = resources.threads - 2 * READ_CPUS
    # The type of a function on Arrow tables is one that ray.data's own hints do not know.
    read: Any = read_shard
    encoded = (
        ray.data.from_arrow(shard_rows(attempts))
        .map_batches(
            read,
            fn_kwargs={"settings": settings},
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=min(most + 1, len(attempts))),
            num_cpus=READ_CPUS,
            **_of(resources.read_resource),
        )
        .map_batches(
            EncodeWorker,
            fn_constructor_kwargs={"settings": settings},
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=min(pool.smallest, most), max_size=most, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=encode_cpus,
            num_gpus=1 if resources.gpus else 0,
            # Ray would run a shard that kills its worker again without end.
            max_task_retries=0,
            **_of(resources.encode_resource),
        )
    )
    missing = {attempt.shard.id for attempt in attempts}
    reason = "its worker died (out of memory, or killed); see Ray's logs"
    try:
        answers: Any = encoded.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for answer in answers:
            for row in answer.to_pylist():
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
