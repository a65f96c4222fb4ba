"""Exact search over a table in one process or, where the table is large, on Ray.

In: a table at a pinned version and queries. Out: their exact nearest entries, the same either way:
tasks search runs of neighbouring fragments, and what they find is merged as it comes in. How long it
will take is told before it starts.
"""

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import ray

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.patches import PatchTable, TablePart
from arrag_runtime.format.specs import Floats
from arrag_runtime.search.neighbors import Neighbors
from pipeline.resources.ray_session import ray_cluster
from schemas.settings.resources import RayResources
from stages.measure.exact_search import Queries, exact_search, merge_nearest

LONG = 60.0
"""Seconds from which a search is announced."""
FEW_ROWS = 4_000_000
"""Up to so many the search is over before its cost is read."""
ROWS_A_TASK = 5_000_000
RAY_FROM = 50_000_000
"""Rows from which tasks are worth an embedded Ray's start."""

Announce = Callable[[str], None]
Progress = Callable[[int, int], None]


def exact_neighbors(
    table: PatchTable,
    codes: Floats,
    queries: Queries,
    k: int,
    *,
    weights: tuple[float, ...] | None = None,
    skip: Ids | None = None,
    left_out: Ids | None = None,
    resources: RayResources | None = None,
    announce: Announce = lambda _cost: None,
    progress: Progress = lambda _done, _total: None,
) -> Neighbors:
    """The k nearest entries of every query, by the means that suit the table's size.

    See `exact_search` for weights, skip and left_out. resources: where tasks run; None keeps all in here,
    unless the table has more than 50 million rows.
    """
    cores = 1
    distributed = resources is not None or table.count > RAY_FROM
    if distributed:
        with ray_cluster(resources or RayResources()):
            cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            cores = max(1, int(cluster.get("CPU", 1)))
            announce_cost(table, codes, queries, cores, announce)
            return search_on_ray(
                table,
                codes,
                queries,
                k,
                weights=weights,
                skip=skip,
                left_out=left_out,
                progress=progress,
            )
    announce_cost(table, codes, queries, cores, announce)
    return exact_search(
        *(table.blocks(), codes, queries, k),
        weights=weights,
        skip=skip,
        left_out=left_out,
        progress=lambda done: progress(done, table.count),
    )


def announce_cost(
    table: PatchTable, codes: Floats, queries: Queries, cores: int, announce: Announce
) -> float:
    """Seconds the search will take on so many cores, told when it is long; 0 for a small table.

    Taken from the first block and its single nearest entries: in a long search nearly all blocks go
    by as fast as that, whatever k is, for few of their entries are near enough.
    """
    block = next(table.blocks(), None)
    if block is None or table.count <= FEW_ROWS:
        return 0.0
    started = time.perf_counter()
    exact_search([block], codes, queries, 1)
    seconds = (time.perf_counter() - started) * table.count / len(block.patch_ids) / cores
    if seconds > LONG:
        announce(
            f"comparing {len(queries.keys):,} queries with all {table.count:,} entries takes about"
            f" {seconds / 60:.0f} minutes on {cores} core{'s' if cores > 1 else ''}"
        )
    return seconds


def search_on_ray(
    table: PatchTable,
    codes: Floats,
    queries: Queries,
    k: int,
    *,
    weights: tuple[float, ...] | None = None,
    skip: Ids | None = None,
    left_out: Ids | None = None,
    rows_a_task: int = ROWS_A_TASK,
    progress: Progress = lambda _done, _total: None,
) -> Neighbors:
    """`exact_search` over the whole table by tasks of a Ray session that runs."""
    parts = table.parts(rows_a_task)
    if not parts:
        return exact_search([], codes, queries, k, weights=weights)
    shared = ray.put((table.path, table.version, codes, queries, k, weights, skip, left_out))
    task: Any = ray.remote(num_cpus=1, max_retries=2)(_search_part)
    # Few results at a time wait in Ray's store, each of queries x k entries.
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    in_flight = 2 * max(1, int(cluster.get("CPU", 1)))
    coming = iter(parts)
    waiting = {task.remote(shared, part): part for part in islice(coming, in_flight)}
    best: Neighbors | None = None
    done = 0
    while waiting:
        [ready], _ = ray.wait(list(waiting), num_returns=1)
        for part in islice(coming, 1):
            waiting[task.remote(shared, part)] = part
        found = ray.get(ready)
        # Arrays from Ray's store are read-only views of it; merging copies them out.
        best = merge_nearest([found] if best is None else [best, found])
        done += waiting.pop(ready).count
        progress(done, table.count)
    assert best is not None
    return best


def _search_part(shared: tuple[Any, ...], part: TablePart) -> Neighbors:
    """One task: the nearest entries among one part's rows."""
    path, version, codes, queries, k, weights, skip, left_out = shared
    table = PatchTable(path, version)
    return exact_search(
        *(table.blocks(part=part), np.array(codes), queries, k),
        weights=weights,
        skip=skip,
        left_out=left_out,
        first_row=part.start,
    )
