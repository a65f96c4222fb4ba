"""The coarse lists of a codebook index: how many, where their centroids lie, which one a key is in.

k-means is the only thing that a codebook index has to learn. With many lists it is done in two
levels (clusters of the sample, then lists within each cluster), and a key finds its list through a
small index over the centroids, so that both cost about keys · √lists instead of keys · lists. A
search looks at the centroids exactly, or through a graph when they are very many.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.specs import Floats

_TWO_LEVELS_FROM = 4096
_GRAPH_FROM = 65_537
"""With this many lists or more a search finds the nearest ones through a graph."""
POINTS_PER_LIST = 64
_ROUNDS = 10
_BLOCK = 131_072
"""Vectors of a sample that are made at a time."""
_GROUPS_SEARCHED = 4
"""Groups of centroids in which a key looks for its own; the nearest is missed once in hundreds."""


def train_centroids(
    sample: npt.NDArray[Any],
    lists: int,
    *,
    seed: int,
    vectors_of: Callable[[npt.NDArray[Any]], Floats] = np.asarray,
) -> Floats:
    """Centroids float32 [lists, D] of a sample [N, ..], N ≥ lists, in the sample's order.

    The sample is what was drawn over all shards; its order must not follow them. vectors_of: makes
    search vectors float32 [M, D] of some of it, so that millions of keys need not all be vectors at
    once; without it the sample is float32 [N, D].
    """
    if lists < _TWO_LEVELS_FROM:
        return _kmeans(vectors_of(sample), lists, seed)
    groups = round(math.sqrt(lists))
    upper = _kmeans(vectors_of(sample[: groups * 256]), groups, seed)
    blocks = (sample[start : start + _BLOCK] for start in range(0, len(sample), _BLOCK))
    group_of = np.concatenate([nearest(upper, vectors_of(block)) for block in blocks])
    members = _by_group(group_of, groups)
    shares = _apportion(np.array([len(own) for own in members]), lists)
    return np.concatenate(
        [
            _kmeans(vectors_of(sample[own]), int(share), seed)
            for own, share in zip(members, shares, strict=True)
            if share
        ]
    )


def _by_group(group_of: npt.NDArray[Any], groups: int) -> list[Ids]:
    """The members of each group, ascending, from the group of each."""
    order = np.argsort(group_of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(group_of, minlength=groups))[:-1])


def _apportion(sizes: Ids, lists: int) -> Ids:
    """Lists for each group in proportion to its points, never more than it has points."""
    cumulated = np.concatenate([[0], np.cumsum(sizes)]) * lists // sizes.sum()
    shares: Ids = np.minimum(np.diff(cumulated), sizes)
    return shares


def _kmeans(vectors: Floats, count: int, seed: int) -> Floats:
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=_ROUNDS,
        seed=seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 20,
    )
    kmeans.train(np.ascontiguousarray(vectors))
    return np.asarray(kmeans.centroids, np.float32)


def nearest(centroids: Floats, vectors: Floats) -> Ids:
    """The exactly nearest centroid of each vector, int64 [N]."""
    lists: Ids = faiss.knn(vectors, centroids, 1)[1][:, 0]
    return lists


class ListFinder:
    """Finds the list of a key: exactly with few lists, else within the nearest groups of lists."""

    def __init__(self, centroids: Floats) -> None:
        self._centroids = np.ascontiguousarray(centroids)
        self._grouped = len(centroids) >= _TWO_LEVELS_FROM
        if self._grouped:
            self._upper = _kmeans(centroids, round(math.sqrt(len(centroids))), seed=0)
            self._members = _by_group(nearest(self._upper, centroids), len(self._upper))

    def __call__(self, vectors: Floats) -> Ids:
        """The list of each search vector float32 [N, D], int64 [N]."""
        if not self._grouped:
            return nearest(self._centroids, vectors)
        groups = faiss.knn(vectors, self._upper, min(_GROUPS_SEARCHED, len(self._upper)))[1]
        best = np.full(len(vectors), np.inf, np.float32)
        lists = np.zeros(len(vectors), np.int64)
        for rank in groups.T.astype(np.uint16):
            # All keys that look into one group do so together, in one product of matrices.
            for rows, members in zip(_by_group(rank, len(self._upper)), self._members, strict=True):
                if len(rows) and len(members):
                    distances, at = faiss.knn(vectors[rows], self._centroids[members], 1)
                    nearer = distances[:, 0] < best[rows]
                    best[rows[nearer]] = distances[nearer, 0]
                    lists[rows[nearer]] = members[at[nearer, 0]]
        return lists


def write_graph(centroids: Floats, path: Path) -> None:
    """Write the graph over the centroids where there are so many that a search needs one."""
    if len(centroids) < _GRAPH_FROM:
        return
    graph = faiss.IndexHNSWFlat(centroids.shape[1], 32)
    graph.hnsw.efConstruction = 100
    graph.add(np.ascontiguousarray(centroids))
    faiss.write_index(graph, str(path))
