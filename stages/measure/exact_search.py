"""The exact nearest entries of queries, found in one pass over a table: what indexes are judged by.

In: token keys as generation asks them, and blocks of patches. Out: for each query its K nearest
entries with distance, next token, patch id and row. The queries' own pictures are left out, and so
are entries that an index keeps only as copies of another. Memory is bounded by queries × K,
whatever the table's size.

How: a matrix product of queries and a tile of entries says which can be nearer than the K-th found
so far. Few can, once some blocks have been seen, and only for those the distance is computed value
by value. It therefore does not depend on how the table is cut, and parts searched apart and merged
give what one search gives.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import NO_IMAGE, Ids, contains, split_patch_ids
from arrag_runtime.format.patches import PatchBlock
from arrag_runtime.format.specs import Floats, key_vectors, squared_distances
from arrag_runtime.search.neighbors import Neighbors

_ROW_SHIFT = 33
"""A distance's 31 bits and a row's 33 make one number, by which entries are ordered."""
_TILE, _QUERY_TILE = 2048, 256
_MARGIN = 1e-5
"""Products of float32 vectors and differences of them disagree by less, relative to the norms."""
_NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)
_Packed = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Queries:
    """Positions of pictures whose next token is known."""

    keys: npt.NDArray[np.uint16]
    """uint16 [Q, n]."""
    next_tokens: npt.NDArray[np.uint16]
    """uint16 [Q], the true ones."""
    images: Ids
    """int64 [Q], the pictures that the positions are in."""
    exclude: Ids
    """int64 [Q, M], the pictures that a query must not find, filled up with -1."""
    protocol: str
    """What they are, in words."""

    @property
    def excluded(self) -> Ids | None:
        """`exclude` as a search takes it: None where no query leaves out a picture."""
        return None if (self.exclude == NO_IMAGE).all() else self.exclude

    def take(self, chosen: npt.NDArray[Any]) -> "Queries":
        """Some of the queries, by mask or index."""
        columns = ("keys", "next_tokens", "images", "exclude")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})


def exact_search(
    blocks: Iterable[PatchBlock],
    codes: Floats,
    queries: Queries,
    k: int,
    *,
    weights: tuple[float, ...] | None = None,
    skip: Ids | None = None,
    left_out: Ids | None = None,
    first_row: int = 0,
    progress: Callable[[int], None] = lambda _rows: None,
) -> Neighbors:
    """The k nearest entries of every query, of equal ones the earlier row first; `places` are rows.

    blocks: the table's, in order, from `first_row` on; codes: the normalised codebook [V, d];
    weights: one per offset; skip: sorted patch ids that are no entries of their own; left_out:
    sorted ids of pictures whose entries are none; progress: called with the rows done.
    """
    if k < 1:
        raise BadInputError(f"k is {k}; ask for at least 1 neighbour")
    best = _Best(key_vectors(queries.keys, codes, weights), queries.exclude, k)
    row = first_row
    for block in blocks:
        count = len(block.patch_ids)
        if row + count > 1 << _ROW_SHIFT:
            raise BadInputError(f"exact search counts rows up to {1 << _ROW_SHIFT:,}")
        keep = np.ones(count, bool) if skip is None else ~contains(skip, block.patch_ids)
        if left_out is not None:
            keep &= ~contains(left_out, split_patch_ids(block.patch_ids)[0])
        kept = np.flatnonzero(keep)
        for start in range(0, len(kept), _TILE):
            here = kept[start : start + _TILE]
            tile = block.take(here)
            best.offer(tile, row + here, key_vectors(tile.keys, codes, weights))
        row += count
        progress(row - first_row)
    return best.result()


def merge_nearest(parts: Sequence[Neighbors]) -> Neighbors:
    """The nearest of what was found in several parts of a table, each with its true rows."""
    distances = np.concatenate([part.distances for part in parts], axis=1)
    rows = np.concatenate([part.places for part in parts], axis=1)
    packed = np.where(rows >= 0, _pack(distances, np.maximum(rows, 0)), _NOTHING)
    k = parts[0].places.shape[1]
    return Neighbors.chosen(parts, np.argsort(packed, axis=1)[:, :k])


def true_distances(
    blocks: Iterable[PatchBlock],
    codes: Floats,
    queries: Queries,
    patch_ids: Ids,
    *,
    weights: tuple[float, ...] | None = None,
) -> Floats:
    """Squared distances of queries to entries named by id [Q, K], float32 [Q, K], from one pass.

    For answers of an index whose own distances are approximations. Infinite for -1 and for ids that
    are not in the table.
    """
    wanted = np.unique(patch_ids)
    named = [block.take(contains(wanted, block.patch_ids)) for block in blocks]
    distances = np.full(patch_ids.shape, np.inf, np.float32)
    if not named:
        return distances
    keys = np.concatenate([block.keys for block in named])
    known = np.concatenate([block.patch_ids for block in named])
    order = np.argsort(known)
    known, keys = known[order], keys[order]
    vectors = key_vectors(queries.keys, codes, weights)
    for row, ids in enumerate(patch_ids):
        here = contains(known, ids)
        entries = key_vectors(keys[np.searchsorted(known, ids[here])], codes, weights)
        distances[row, here] = squared_distances(entries, vectors[row])
    return distances


class _Best:
    """The nearest entries so far of each query: up to k, and unsorted newcomers behind them."""

    def __init__(self, vectors: Floats, exclude: Ids, k: int) -> None:
        self.vectors, self.exclude, self.k = vectors, exclude, k
        shape = (len(vectors), k + _TILE)
        self.packed: _Packed = np.full(shape, _NOTHING)
        self.ids = np.full(shape, -1, np.int64)
        self.tokens = np.zeros(shape, np.uint16)
        self.fill = np.zeros(len(vectors), np.int64)
        self.last: _Packed = np.full(len(vectors), _NOTHING)
        """The k-th nearest of each, once there are as many; nothing beyond it can enter."""

    def offer(self, tile: PatchBlock, rows: Ids, entries: Floats) -> None:
        """Add what of a tile is nearer to a query than its k-th nearest so far.

        rows: of the table, int64 [N]; entries: the tile's search vectors, float32 [N, D].
        """
        halves = 0.5 * np.einsum("nd,nd->n", entries, entries)
        images = split_patch_ids(tile.patch_ids)[0]
        for start in range(0, len(self.vectors), _QUERY_TILE):
            span = slice(start, start + _QUERY_TILE)
            vectors, exclude, last = self.vectors[span], self.exclude[span], self.last[span]
            limits = np.where(last == _NOTHING, np.inf, _distances(last).astype(np.float64))
            squares = np.einsum("qd,qd->q", vectors, vectors).astype(np.float64)
            # ‖q − x‖² ≤ limit, as q·x − ‖x‖²/2 ≥ (‖q‖² − limit)/2, with room for rounding.
            floor = (squares - limits) / 2 - _MARGIN * (1 + squares)
            scores = vectors @ entries.T
            scores -= halves
            flat = np.flatnonzero(scores >= floor.astype(np.float32)[:, None])
            if not len(flat):
                continue
            query, entry = np.divmod(flat, len(rows))
            apart = squared_distances(entries.take(entry, axis=0), vectors.take(query, axis=0))
            packed = _pack(apart, rows[entry])
            near = packed < last[query]
            for column in exclude.T:
                near &= column[query] != images[entry]
            query, entry = query[near], entry[near]
            self._add(start + query, packed[near], tile.patch_ids[entry], tile.next_tokens[entry])

    def _add(self, at: Ids, packed: _Packed, ids: Ids, tokens: Any) -> None:
        """Newcomers of queries `at` (ascending), at most _TILE for each."""
        members, starts, sizes = np.unique(at, return_index=True, return_counts=True)
        full = members[self.fill[members] + sizes > self.packed.shape[1]]
        if len(full):
            self._shrink(full)
        places: Ids = self.fill[at] + np.arange(len(at)) - np.repeat(starts, sizes)
        self.packed[at, places], self.ids[at, places], self.tokens[at, places] = packed, ids, tokens
        self.fill[members] += sizes

    def _shrink(self, members: Ids) -> None:
        """Keep the k nearest of these queries."""
        packed = self.packed[members]
        order = np.argpartition(packed, self.k - 1, axis=1)[:, : self.k]
        for mine, empty in ((self.packed, _NOTHING), (self.ids, -1), (self.tokens, 0)):
            kept = np.take_along_axis(mine[members], order, axis=1)
            mine[members, self.k :] = empty
            mine[members, : self.k] = kept
        self.last[members] = self.packed[members, : self.k].max(axis=1)
        self.fill[members] = self.k

    def result(self) -> Neighbors:
        order = np.argsort(self.packed, axis=1)[:, : self.k]
        packed: _Packed = np.take_along_axis(self.packed, order, axis=1)
        return Neighbors.of(
            np.take_along_axis(self.tokens, order, axis=1),
            _distances(packed),
            np.take_along_axis(self.ids, order, axis=1),
            (packed != _NOTHING).sum(axis=1),
            places=(packed & np.uint64((1 << _ROW_SHIFT) - 1)).astype(np.int64),
        )


def _pack(distances: Floats, rows: Ids) -> _Packed:
    """Distances and rows as numbers of the same order: floats ≥ 0 sort like their bits."""
    bits = np.ascontiguousarray(distances, np.float32).view(np.uint32).astype(np.uint64)
    return (bits << np.uint64(_ROW_SHIFT)) | rows.astype(np.uint64)


def _distances(packed: _Packed) -> Floats:
    """The distances that were packed."""
    return (packed >> np.uint64(_ROW_SHIFT)).astype(np.uint32).view(np.float32)
