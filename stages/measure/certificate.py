"""How good an index is, against exact search over the same table, and how many lists that takes.

In: an opened index, queries and their exact nearest entries. Out: a certificate for the manifest:
at each nprobe that was tried recall@k, how far the retrieved distribution is from the exact one,
how much farther the results lie, and the time of a query. nprobe is the smallest that reaches the
target; where none does, the certificate says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from arrag_runtime.daid import TAU, Merge
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.specs import Floats
from arrag_runtime.search.neighbors import Neighbors
from stages.measure.exact_search import Queries
from stages.measure.retrieved_distribution import total_variation

_DEPTHS = (1, 10, 100, 2048)
"""recall@k is measured at these k; DAiD retrieves 2,048 (AR-RAG, section 3.2), FAiD 10."""
_TOLERANCE = 1e-5
"""Distances of unit vectors computed in two ways differ by less, relative to their size."""
_PLATEAU = 0.005
_SINGLE_QUERIES = 100
_MERGE: Merge = "nearest"
"""How the distributions compared are merged; their temperature is the paper's."""
Depths = dict[str, float]
"""A figure at each k as text."""


class Index(Protocol):
    """What is certified. `lists` None: an index without lists, so without nprobe."""

    nprobe: Any

    @property
    def lists(self) -> int | None: ...

    def search(
        self, keys: npt.NDArray[Any], k: int, *, exclude: Ids | None = None
    ) -> Neighbors: ...


@dataclass(frozen=True)
class Target:
    """Recall@k that is wanted."""

    recall: float = 0.95
    """Above 0, up to 1."""
    k: int = 10

    @staticmethod
    def parse(text: str) -> "Target":
        """A target as typed: "0.95" (at 10) or "0.9@2048". Raises BadInputError for others."""
        recall, _, k = text.partition("@")
        try:
            target = Target(float(recall), int(k) if k else 10)
        except ValueError as error:
            raise BadInputError(
                f"target recall '{text}' is no recall; write it like 0.95 or 0.9@2048"
            ) from error
        if not 0 < target.recall <= 1 or not 1 <= target.k <= _DEPTHS[-1]:
            raise BadInputError(
                f"target recall '{text}' is out of range; recall is 0..1 and k 1..{_DEPTHS[-1]}"
            )
        return target

    def __str__(self) -> str:
        return f"recall@{self.k} of {self.recall:g}"


@dataclass(frozen=True)
class Certified:
    """An index at one nprobe. Keys of the mappings are k as text, since they are stored as JSON."""

    nprobe: int | None
    """None for an index without lists."""
    recall: Depths
    """The share of answers as near as the k-th exact one, so ties there are hits."""
    lowest_tenth: Depths
    """The 10 % quantile of recall over queries."""
    total_variation: float
    """Between DAiD's distributions, mean over queries: 0 the same, 1 disjoint."""
    distance_ratio: Depths
    """Total distance of the first k answers by that of the same number of exact ones."""
    ms_batch: float
    """Milliseconds per query, all asked at once at the largest k."""


@dataclass(frozen=True)
class Certificate:
    """What was measured, how, and which nprobe follows."""

    target: Target
    reached: bool
    """Whether the chosen nprobe reaches the target."""
    chosen: Certified
    tried: tuple[Certified, ...]
    """Ascending in nprobe."""
    queries: int
    """How many were asked."""
    protocol: str
    """What the queries are, in words."""
    temperature: float
    """Of the distributions compared, in squared L2."""
    merge: Merge
    """Of the distributions compared."""
    ms_per_query: dict[str, dict[str, float]]
    """k as text → "batch" and "single", at the chosen nprobe."""
    threads: int
    """With which the times were measured."""

    @staticmethod
    def from_json(kept: dict[str, Any]) -> "Certificate":
        """What `asdict` gave, perhaps with more beside it."""
        known = {field.name: kept[field.name] for field in fields(Certificate)}
        known["target"] = Target(**kept["target"])
        known["chosen"] = Certified(**kept["chosen"])
        known["tried"] = tuple(Certified(**one) for one in kept["tried"])
        return Certificate(**known)

    def to_text(self) -> str:
        """For people: what was chosen and why, and a line per try."""
        chosen, at = self.chosen, str(self.target.k)
        probe = f"nprobe {chosen.nprobe}" if chosen.nprobe else "exhaustive"
        verdict = "reaches" if self.reached else "does not reach"
        said = ", ".join(f"@{k} {recall:.3f}" for k, recall in chosen.recall.items())
        times = ", ".join(
            f"k {k}: {ms['batch']:.2f} in a batch, {ms['single']:.2f} alone"
            for k, ms in self.ms_per_query.items()
        )
        lines = [
            f"{probe} {verdict} {self.target}: recall {said}",
            f"  ms a query ({self.threads} threads): {times}",
            f"  {self.protocol}, against exact search; ties are hits",
            f"  {'nprobe':>8}{f'recall@{at}':>14}{'lowest tenth':>14}"
            f"{'variation':>11}{'distance':>10}{'ms':>9}",
        ]
        lines += [
            f"  {one.nprobe or '-':>8}{one.recall[at]:>14.3f}{one.lowest_tenth[at]:>14.3f}"
            f"{one.total_variation:>11.3f}{one.distance_ratio[at]:>10.3f}{one.ms_batch:>9.2f}"
            for one in self.tried
        ]
        if not self.reached and chosen.nprobe:
            best = max(tried.recall[at] for tried in self.tried)
            lines.append(
                f"  no nprobe reaches it: the best found is {best:.3f}, and nprobe {chosen.nprobe} is"
                f" the first within {_PLATEAU} of that"
            )
        return "\n".join(lines)


def certify(
    index: Index,
    queries: Queries,
    exact: Neighbors,
    target: Target,
    *,
    distances_of: Callable[[Ids], Floats] | None = None,
    threads: int = 1,
    nprobe: int | None = None,
    progress: Callable[[int | None], None] = lambda _nprobe: None,
) -> Certificate:
    """Measure an index and choose its nprobe, which it keeps.

    exact: the nearest entries in the index's own metric, at least as many as the largest k that the
    table allows; distances_of: for an index whose distances are approximations, the true distances
    float32 [Q, K] of patch ids int64 [Q, K]; nprobe: measure this one alone.
    progress is called with each nprobe before it is tried.
    """
    depths = tuple(sorted({*_DEPTHS, target.k}))
    deepest = min(depths[-1], exact.tokens.shape[1])
    if deepest < target.k:
        raise BadInputError(f"{target} needs exact neighbours up to k {target.k}, not {deepest}")
    exclude = queries.excluded

    def measure(nprobe: int | None) -> Certified:
        progress(nprobe)
        if nprobe is not None:
            index.nprobe = nprobe
        started = time.perf_counter()
        answer = index.search(queries.keys, deepest, exclude=exclude)
        spent = time.perf_counter() - started
        true = answer.distances if distances_of is None else distances_of(answer.patch_ids)
        hits = {k: recall_at(true, answer.count, exact, k) for k in depths if k <= deepest}
        return Certified(
            nprobe=nprobe,
            recall={str(k): float(found.mean()) for k, found in hits.items()},
            lowest_tenth={str(k): float(np.quantile(found, 0.1)) for k, found in hits.items()},
            total_variation=float(total_variation(answer, exact, TAU, _MERGE).mean()),
            distance_ratio={str(k): _distance_ratio(true, answer.count, exact, k) for k in hits},
            ms_batch=1000 * spent / len(queries.keys),
        )

    if nprobe is not None or index.lists is None:
        tried = [measure(nprobe)]
    else:
        tried = _try(measure, index.lists, target, approximate=distances_of is not None)
    at = str(target.k)
    best = max(one.recall[at] for one in tried)
    enough = target.recall if best >= target.recall else best - _PLATEAU
    chosen = next(one for one in tried if one.recall[at] >= enough)
    if chosen.nprobe is not None:
        index.nprobe = chosen.nprobe
    times = {str(k): _time(index, queries, k, exclude) for k in sorted({min(10, deepest), deepest})}
    return Certificate(
        target=target,
        reached=best >= target.recall,
        chosen=chosen,
        tried=tuple(tried),
        queries=len(queries.keys),
        protocol=queries.protocol,
        temperature=TAU,
        merge=_MERGE,
        ms_per_query=times,
        threads=threads,
    )


def recall_at(
    distances: Floats, count: npt.NDArray[np.int64], exact: Neighbors, k: int
) -> npt.NDArray[np.float64]:
    """recall@k of each query, float64 [Q].

    distances: true ones of the answers [Q, K], in the order returned, of which `count` are real. An
    answer is a hit when it is as near as the k-th exact entry; where the table has fewer than k
    that may be found, all of those count as the k.
    """
    reachable = np.minimum(exact.count, k)
    last = exact.distances[np.arange(len(count)), np.maximum(reachable - 1, 0)]
    limit = last + _TOLERANCE * np.maximum(1, last)
    real = np.arange(min(k, distances.shape[1])) < count[:, None]
    hits = (real & (distances[:, :k] <= limit[:, None])).sum(axis=1)
    recall: npt.NDArray[np.float64] = np.where(
        reachable > 0, np.minimum(hits, reachable) / np.maximum(reachable, 1), 1.0
    )
    return recall


def _distance_ratio(
    distances: Floats, count: npt.NDArray[np.int64], exact: Neighbors, k: int
) -> float:
    """Sum of the first k answers' distances by that of as many exact ones; 1 where both are 0."""
    width = min(k, distances.shape[1])
    both = np.arange(width) < np.minimum(count, exact.count)[:, None]
    # What rounding leaves of a distance of 0 must not count as far beyond 0.
    rounding = _TOLERANCE * max(int(both.sum()), 1)
    mine = np.where(both, distances[:, :width], 0).sum(dtype=np.float64)
    best = np.where(both, exact.distances[:, :width], 0).sum(dtype=np.float64)
    return float((mine + rounding) / (best + rounding))


def _try(
    measure: Callable[[int], Certified], lists: int, target: Target, *, approximate: bool
) -> list[Certified]:
    """Powers of two until the target is reached, then halving the gap below; ascending in nprobe.

    More lists can only find more. Where distances are approximations they soon find nothing more,
    so for those two doublings without gain are the end; otherwise all lists are.
    """
    tried: dict[int, Certified] = {}

    def recall(nprobe: int) -> float:
        tried[nprobe] = measure(nprobe)
        return tried[nprobe].recall[str(target.k)]

    low, high, best, still = 0, 1, -1.0, 0
    while (found := recall(high)) < target.recall:
        still = still + 1 if found < best + 0.001 else 0
        best = max(best, found)
        if high == lists or (approximate and still == 2):
            return list(tried.values())
        low, high = high, min(2 * high, lists)
    while high - low > 1:
        middle = (low + high) // 2
        if recall(middle) >= target.recall:
            high = middle
        else:
            low = middle
    return [tried[n] for n in sorted(tried)]


def _time(index: Index, queries: Queries, k: int, exclude: Ids | None) -> dict[str, float]:
    """Milliseconds per query, all in one call and one a call."""
    started = time.perf_counter()
    index.search(queries.keys, k, exclude=exclude)
    batch = time.perf_counter() - started
    alone = min(_SINGLE_QUERIES, len(queries.keys))
    started = time.perf_counter()
    for at in range(alone):
        own = None if exclude is None else exclude[at : at + 1]
        index.search(queries.keys[at : at + 1], k, exclude=own)
    single = time.perf_counter() - started
    return {"batch": 1000 * batch / len(queries.keys), "single": 1000 * single / alone}
