"""Exact search over a table in one process or, where the table is large, on Ray.

In: a table at a pinned version and queries. Out: their exact nearest entries, the same either way,
for tasks search runs of neighbouring fragments, and what they find is merged as it comes in. How
long it will take is told before it starts.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import ray

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.inverted_lists import ListPart
from arrag_runtime.format.patches import PatchTable, TablePart
from arrag_runtime.format.specs import Floats
from arrag_runtime.search.neighbors import Neighbors
from pipeline.resources.ray_session import cluster_cores, ray_cluster, run_tasks
from schemas.settings.resources import RayResources
from stages.measure.exact_search import Queries, exact_search, merge_nearest

_LONG = 60.0
"""Seconds from which a search is announced."""
_FEW_ROWS = 4_000_000
"""With up to so many rows the search is over before its cost is read."""
_ROWS_PER_TASK = 5_000_000
_RAY_FROM_ROWS = 50_000_000
"""Rows from which tasks are worth an embedded Ray's start."""
_Announce = Callable[[str], None]
_Progress = Callable[[int, int], None]
_Search = Callable[..., Neighbors]
"""`exact_search` with all that is asked; what is left to give are the blocks."""


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
    announce: _Announce = lambda _cost: None,
    progress: _Progress = lambda _done, _total: None,
) -> Neighbors:
    """The k nearest entries of every query, by the means that suit the table's size.

    See `exact_search` for weights, skip and left_out. resources: where tasks run; None keeps all
    in this process, unless the table has more than 50 million rows.
    """
    search = partial(
        exact_search,
        codes=codes,
        queries=queries,
        k=k,
        weights=weights,
        skip=skip,
        left_out=left_out,
    )
    if resources is not None or table.count > _RAY_FROM_ROWS:
        with ray_cluster(resources or RayResources()):
            announce_cost(table, codes, queries, cluster_cores(), announce)
            return search_on_ray(table, search, progress=progress)
    announce_cost(table, codes, queries, 1, announce)
    return search(table.blocks(), progress=lambda done: progress(done, table.count))


def announce_cost(
    table: PatchTable, codes: Floats, queries: Queries, cores: int, announce: _Announce
) -> float:
    """Seconds the search will take on so many cores, told when it is long; 0 for a small table.

    Taken from the first block and its single nearest entries: in a long search nearly all blocks go
    by as fast as that, whatever k is, for few of their entries are near enough.
    """
    block = next(table.blocks(), None)
    if block is None or table.count <= _FEW_ROWS:
        return 0.0
    started = time.perf_counter()
    exact_search([block], codes, queries, 1)
    seconds = (time.perf_counter() - started) * table.count / len(block.patch_ids) / cores
    if seconds > _LONG:
        announce(
            f"comparing {len(queries.keys):,} queries with all {table.count:,} entries takes about"
            f" {seconds / 60:.0f} minutes on {cores} core{'s' if cores > 1 else ''}"
        )
    return seconds


def search_on_ray(
    table: PatchTable,
    search: _Search,
    *,
    rows_a_task: int = _ROWS_PER_TASK,
    progress: _Progress = lambda _done, _total: None,
) -> Neighbors:
    """`search` over the whole table by tasks of a Ray session that runs."""
    best: Neighbors | None = None
    done = 0
    shared = (table.path, table.version, ray.put(search))
    for part, found in run_tasks(_search_part, table.parts(rows_a_task), *shared):
        # Arrays from Ray's store are read-only views of it; merging copies them out.
        best = merge_nearest([found] if best is None else [best, found])
        done += part.count
        progress(done, table.count)
    return search([]) if best is None else best


def _search_part(part: TablePart, path: str, version: int, search: _Search) -> Neighbors:
    """One task: the nearest entries among one part's rows."""
    return search(PatchTable(path, version).blocks(part=part), first_row=part.start)


def copies_left_aside(parts: Sequence[ListPart]) -> Ids:
    """The patch ids, ascending, that an index stores as copies of another entry: none of its own.

    An exact search by which the index is judged skips them.
    """
    aside = [np.delete(part.copies_ids, part.copies_start[:-1]) for part in parts]
    return np.sort(np.concatenate([np.empty(0, np.int64), *aside]))
