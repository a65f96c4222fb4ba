"""Neighbourhoods: which tokens around a position form its key.

In: token grids of shape [B, h, w]. Out: keys of shape [B, P, n], one for each of the P positions
that have a key, n being the number of neighbours. A key holds the neighbours' tokens in the order
of the offsets; `MISSING` marks a neighbour outside the grid. The keys of a whole grid and the key
of a single position come from one table of indices, so they cannot differ.

Source: AR-RAG (arXiv 2506.06962), section 3.1 (h-hop neighbourhoods) and the appendix (Show-o).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError

MISSING = 65535
"""The token that stands for "no neighbour here"; no codebook may use it."""
Border = Literal["skip", "zero"]
BORDERS: tuple[Border, ...] = ("skip", "zero")


@dataclass(frozen=True)
class Neighborhood:
    """A named set of offsets relative to the position whose token comes next."""

    name: str
    offsets: tuple[tuple[int, int], ...]
    """(row, column) of each neighbour, in the order of a key."""
    border: Border = "skip"
    """Where a neighbour falls outside the grid, "skip" gives the position no key, and "zero" a key
    in which that neighbour is missing (a zero vector)."""

    @property
    def size(self) -> int:
        """The number of neighbours n."""
        return len(self.offsets)

    @property
    def is_causal(self) -> bool:
        """Whether every neighbour comes before the position in raster order."""
        return all(offset < (0, 0) for offset in self.offsets)

    def positions(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """The flat positions (row · width + column) that have a key, ascending, int64 [P]."""
        return _index_table(self, height, width)[0]

    def keys(self, grids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The keys of whole grids.

        grids: uint16 [B, h, w] tokens, or [B, h, w, d] vectors.
        Returns [B, P, n] in the same dtype with `MISSING` for absent neighbours, or
        [B, P, n, d] with zero vectors for them.
        """
        _, table = _index_table(self, grids.shape[1], grids.shape[2])
        return _gather(grids, table)

    def key_at(self, grids: npt.NDArray[Any], row: int, col: int) -> npt.NDArray[Any] | None:
        """The keys of one position: [B, n] (or [B, n, d]), or None where it has no key.

        With a causal neighbourhood only the tokens before (row, col) are read, so `grids` may
        hold anything from there on.
        """
        height, width = grids.shape[1], grids.shape[2]
        if not (0 <= row < height and 0 <= col < width):
            raise BadInputError(
                f"position ({row}, {col}) is outside the {height}x{width} grid;"
                f" rows are 0..{height - 1} and columns 0..{width - 1}"
            )
        positions, table = _index_table(self, height, width)
        at = int(np.searchsorted(positions, row * width + col))
        if at == len(positions) or positions[at] != row * width + col:
            return None
        return _gather(grids, table[at : at + 1])[:, 0]


@lru_cache(maxsize=64)
def _index_table(
    hood: Neighborhood, height: int, width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions [P] and, for each, the flat indices of its neighbours [P, n]; h·w = missing."""
    offsets = np.array(hood.offsets, dtype=np.int64)
    rows, cols = np.divmod(np.arange(height * width), width)
    at_row = rows[:, None] + offsets[None, :, 0]
    at_col = cols[:, None] + offsets[None, :, 1]
    inside = (at_row >= 0) & (at_row < height) & (at_col >= 0) & (at_col < width)
    table = np.where(inside, at_row * width + at_col, height * width)
    keep = inside.all(axis=1) if hood.border == "skip" else np.ones(len(rows), dtype=bool)
    positions = np.flatnonzero(keep)
    table = np.ascontiguousarray(table[keep])
    positions.setflags(write=False)
    table.setflags(write=False)
    return positions, table


def _gather(grids: npt.NDArray[Any], table: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Take `table` [P, n] from every grid, with one more cell that stands for "missing"."""
    batch, cells = grids.shape[0], grids.shape[1] * grids.shape[2]
    rest = grids.shape[3:]
    filled = np.empty((batch, cells + 1, *rest), dtype=grids.dtype)
    filled[:, :cells] = grids.reshape(batch, cells, *rest)
    filled[:, cells] = 0 if rest else MISSING
    return np.take(filled, table, axis=1)


def causal(hops: int, border: Border = "skip") -> Neighborhood:
    """The causal ("L") neighbourhood: `hops` full rows above, then the cells to the left."""
    above = [(r, c) for r in range(-hops, 0) for c in range(-hops, hops + 1)]
    left = [(0, c) for c in range(-hops, 0)]
    return Neighborhood(f"causal-{hops}", tuple(above + left), border)


def surround(hops: int, border: Border = "skip") -> Neighborhood:
    """The full ("O") neighbourhood in reading order, for generators that fill masked tokens."""
    span = range(-hops, hops + 1)
    cells = [(r, c) for r in span for c in span if (r, c) != (0, 0)]
    return Neighborhood(f"surround-{hops}", tuple(cells), border)


CAUSAL_1 = causal(1)
CAUSAL_2 = causal(2)
SURROUND_1 = surround(1)
NEIGHBORHOODS: dict[str, Neighborhood] = {n.name: n for n in (CAUSAL_1, CAUSAL_2, SURROUND_1)}


def neighborhood(name: str, border: str = "skip") -> Neighborhood:
    """The neighbourhood of this name and border. Raises BadInputError for an unknown one."""
    if name not in NEIGHBORHOODS:
        raise BadInputError(
            f"unknown neighbourhood '{name}'; choose one of {', '.join(NEIGHBORHOODS)}"
        )
    for known in BORDERS:
        if border == known:
            return Neighborhood(name, NEIGHBORHOODS[name].offsets, known)
    raise BadInputError(f"unknown border '{border}'; choose one of {', '.join(BORDERS)}")
