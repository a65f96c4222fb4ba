"""How much of the exact neighbours a search returns: recall@k against a scan of the whole table.

In: queries and what an index answered. Out: the share of the answers that are as near as the k-th
exact neighbour, so ties at that distance count as hits. The table is streamed, once.
"""

from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from schemas.specs import Floats, key_vectors
from schemas.tables import Ids, split_patch_ids
from stages.read_patches import PatchTable

TOLERANCE = 1e-5
"""Squared distances of unit vectors computed twice differ by less than this."""
NO_IMAGE = -1


@dataclass(frozen=True)
class RecallQueries:
    """vectors: float32 [Q, n · d]; exclude: int64 [Q, M], pictures a query must not find, or -1."""

    vectors: Floats
    exclude: Ids
    protocol: str


def measure_recall(
    table: PatchTable, codes: Floats, queries: RecallQueries, answered: Ids
) -> npt.NDArray[np.float64]:
    """recall@k of each query, float64 [Q].

    answered: patch ids int64 [Q, k] in the order returned, -1 for none. Where the table has fewer
    than k entries that may be found, all of those count as the k.
    """
    count, k = answered.shape
    kth = np.full((count, k), np.inf, np.float32)
    wanted = np.unique(answered[answered >= 0])
    found = np.full((len(wanted), queries.vectors.shape[1]), np.nan, np.float32)
    for block in table.blocks():
        vectors = key_vectors(block.keys, codes)
        images = split_patch_ids(block.patch_ids)[0]
        kth = _merge(kth, _nearest(queries, vectors, images, k))
        at = np.minimum(np.searchsorted(wanted, block.patch_ids), max(len(wanted) - 1, 0))
        if len(wanted):
            hit = wanted[at] == block.patch_ids
            found[at[hit]] = vectors[hit]
    reachable = np.isfinite(kth).sum(axis=1)
    last = kth[np.arange(count), np.maximum(reachable - 1, 0)]
    hits = np.zeros(count)
    for column in range(k):
        ids = answered[:, column]
        if not len(wanted):
            break
        rows = found[np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)]
        distances = ((rows - queries.vectors) ** 2).sum(axis=1)
        hits += (ids >= 0) & (distances <= last + TOLERANCE)
    recall: npt.NDArray[np.float64] = hits / np.maximum(reachable, 1)
    return recall


def _nearest(queries: RecallQueries, vectors: Floats, images: Ids, k: int) -> Floats:
    """The k smallest squared distances of each query in a block, excluded pictures left out."""
    exclude = queries.exclude.reshape(len(queries.vectors), -1)
    _, counts = np.unique(images[np.isin(images, exclude)], return_counts=True)
    spare = int(counts.max()) * exclude.shape[1] if len(counts) else 0
    fetched = min(k + spare, len(vectors))
    distances, rows = faiss.knn(queries.vectors, vectors, fetched)
    if spare:
        for column in exclude.T:
            distances[images[rows] == column[:, None]] = np.inf
        distances.sort(axis=1)
    nearest: Floats = distances[:, :k]
    return nearest


def _merge(best: Floats, more: Floats) -> Floats:
    """The k smallest of two sorted sets of distances."""
    return np.sort(np.concatenate([best, more], axis=1), axis=1)[:, : best.shape[1]]
