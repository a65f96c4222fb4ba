"""A Ray cluster for a run: connected to, or started here for as long as the run lasts.

`ray_cluster` holds the session, `run_tasks` runs tasks in it, and `encoder_pool` says how many
actors of a build fit into it.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions

from arrag_runtime.format.errors import ArragError, BadInputError
from pipeline.resources.malloc import one_arena
from schemas.settings.resources import RayResources

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if resources.address is None:
        options["include_dashboard"] = False
    else:
        _require_reachable(resources.address)
    try:
        with _silent_stderr():
            ray.init(address=resources.address or "local", **options)
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


def cluster_cores() -> int:
    """The CPUs that the cluster of this session declares, at least one."""
    declared: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(declared.get("CPU", 1)))


def run_tasks(
    function: Callable[..., Result], items: Iterable[Item], *shared: Any
) -> Iterator[tuple[Item, Result]]:
    """Run `function(item, *shared)` as a task of one core for each item.

    Two tasks per core are under way at a time, so that few results wait in Ray's store. Each item
    comes with its result, in the order in which they end; the first error ends the run.
    """
    task: Any = ray.remote(num_cpus=1, max_retries=2)(function)
    coming = iter(items)
    waiting = {task.remote(item, *shared): item for item in islice(coming, 2 * cluster_cores())}
    while waiting:
        [ready], _ = ray.wait(list(waiting), num_returns=1)
        for item in islice(coming, 1):
            waiting[task.remote(item, *shared)] = item
        yield waiting.pop(ready), ray.get(ready)


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


@dataclass(frozen=True)
class EncoderPool:
    """How many actors encode: to begin with, and when nodes have joined."""

    smallest: int
    largest: int


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
