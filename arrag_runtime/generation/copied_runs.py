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
    """database, image_id: the source. length: positions in the run, which begins at (row, col) and at (source_row, source_col) in
    the source. matches: positions of the whole picture that repeat the source at that displacement.
    """

    database: int
    image_id: int
    length: int
    row: int
    col: int
    source_row: int
    source_col: int
    matches: int


def longest_copy(
    grid: npt.NDArray[np.uint16], sources: Mapping[tuple[int, int], npt.NDArray[np.uint16]]
) -> CopyRun | None:
    """The longest run of a grid [h, w] that one of the sources explains: (database, image id) → [h, w].

    None where no token of any source recurs. Of equal runs, the one with more matches.
    """
    best: CopyRun | None = None
    for name, source in sources.items():
        found = _longest(grid, source, name)
        if found and (best is None or (found.length, found.matches) > (best.length, best.matches)):
            best = found
    return best


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
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    lengths = np.diff(np.concatenate([starts, [len(ours)]]))
    matches = np.unique(displacement, return_counts=True)
    count_of = dict(zip(matches[0].tolist(), matches[1].tolist(), strict=True))
    counts = np.array([count_of[d] for d in displacement[starts].tolist()])
    at = int(np.lexsort((counts, lengths))[-1])
    row, col = divmod(int(ours[starts[at]]), width)
    source_row, source_col = divmod(int(theirs[starts[at]]), width)
    return CopyRun(*name, int(lengths[at]), row, col, source_row, source_col, int(counts[at]))
