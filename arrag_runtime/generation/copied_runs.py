"""Whether a generated picture copies: long stretches that repeat one source picture's own layout.

In: a generated grid and grids of source pictures. Out: the longest run of positions, one after the
other in reading order, that all hold what the source holds at one and the same displacement.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CopyRun:
    """A run of `length` positions that repeats a source picture's own layout.

    It begins at (row, col) of the generated picture and at (source_row, source_col) of the source.
    """

    database: int
    """The number of the source's database."""
    image_id: int
    length: int
    row: int
    col: int
    source_row: int
    source_col: int
    matches: int
    """Positions of the whole picture that repeat the source at that displacement."""


def longest_copy(
    grid: npt.NDArray[np.uint16], sources: Mapping[tuple[int, int], npt.NDArray[np.uint16]]
) -> CopyRun | None:
    """The longest run of a grid [h, w] that one of the sources explains.

    sources: grids [h, w] by (database, image id). Of equal runs the one with more matches is
    returned; None where no token of any source recurs.
    """
    runs = [_longest(grid, source, name) for name, source in sources.items()]
    found = [run for run in runs if run is not None]
    return max(found, key=lambda run: (run.length, run.matches), default=None)


def _longest(
    grid: npt.NDArray[np.uint16], source: npt.NDArray[np.uint16], name: tuple[int, int]
) -> CopyRun | None:
    width = grid.shape[1]
    ours, theirs = np.nonzero(grid.reshape(-1, 1) == source.reshape(1, -1))
    if not len(ours):
        return None
    # A displacement as one number: rows and columns apart, columns shifted to be positive.
    down = theirs // width - ours // width
    right = theirs % width - ours % width
    displacement = down * (2 * width) + right + width
    order = np.lexsort((ours, displacement))
    ours, theirs, displacement = ours[order], theirs[order], displacement[order]
    breaks = (np.diff(ours) != 1) | (np.diff(displacement) != 0)
    starts = np.append(0, np.flatnonzero(breaks) + 1)
    lengths = np.diff(starts, append=len(ours))
    _, which, counts = np.unique(displacement, return_inverse=True, return_counts=True)
    matches = counts[which[starts]]
    at = np.lexsort((matches, lengths))[-1]
    start, length, matching = starts[at], int(lengths[at]), int(matches[at])
    row, col = divmod(int(ours[start]), width)
    source_row, source_col = divmod(int(theirs[start]), width)
    return CopyRun(*name, length, row, col, source_row, source_col, matching)
