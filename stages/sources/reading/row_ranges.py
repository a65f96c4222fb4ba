"""Pieces: which rows of a file a shard takes, and the rule that no row is ever taken twice.

A file is known by its fingerprint and a row by its number in it. A piece is a range of rows, those
of them for which `where` is true and none of `without` is; `seed` orders them. All of it stands in
the shard's members, so the ledger fixes it:

    "FINGERPRINT START STOP NAME", "where EXPR", "without EXPR", …, "shuffle SEED"

The rule: the options of a build say which rows are wanted (the first `--limit` rows of the source's
order, shuffled or not, for which `--where` is true). What the ledger has recorded is taken off:
where a range was recorded with the same condition or with none, nothing of it is left; where it was
recorded under other conditions, what is left is a new piece `without` those. So the same options go
on where they stopped, and other options add the rows that were not wanted before, and no others.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from schemas.records import RecordedShard, Shard
from stages.sources.reading.fingerprint import make_shard


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of the file with this fingerprint; see the module."""

    print: str
    start: int
    stop: int
    name: str
    where: str | None = None
    without: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def plain(self) -> bool:
        """Whether every row of the range is taken, in order."""
        return self.where is None and not self.without and self.seed is None

    def members(self) -> tuple[str, ...]:
        """As the ledger keeps it."""
        conditions = [f"where {self.where}"] if self.where is not None else []
        conditions += [f"without {other}" for other in self.without]
        conditions += [f"shuffle {self.seed}"] if self.seed is not None else []
        return (f"{self.print} {self.start} {self.stop} {self.name}", *conditions)

    def shard(self, source: str) -> Shard:
        """The shard of this piece alone."""
        return make_shard(source, self.members())

    @staticmethod
    def of(shard: Shard) -> "Piece":
        """The piece that a shard's members describe."""
        print_, start, stop, name = shard.members[0].split(" ", 3)
        tags = [member.split(" ", 1) for member in shard.members[1:]]
        where = next((text for tag, text in tags if tag == "where"), None)
        seed = next((int(text) for tag, text in tags if tag == "shuffle"), None)
        without = tuple(text for tag, text in tags if tag == "without")
        return Piece(print_, int(start), int(stop), name, where, without, seed)

    def order(self, count: int) -> npt.NDArray[np.int64]:
        """The order of its `count` taken rows: that of the file, or one drawn from the seed."""
        if self.seed is None:
            return np.arange(count)
        mixed = [self.seed, self.start, int.from_bytes(self.print.encode(), "big") % 2**32]
        drawn: npt.NDArray[np.int64] = np.random.default_rng(mixed).permutation(count)
        return drawn


@dataclass(frozen=True)
class Wanted:
    """A range of a file that the options ask for."""

    print: str
    start: int
    stop: int
    name: str


def windows(files: Iterable[tuple[str, int, str, int]], seed: int | None) -> list[Wanted]:
    """The files' rows in windows, in the order they are to be taken.

    files: (fingerprint, rows, name, rows a window). A seed shuffles the windows of all files, each
    by a hash of its own, so that a file more or less moves none of the others.
    """
    listed = [
        Wanted(print_, start, min(start + size, rows), name)
        for print_, rows, name, size in files
        for start in range(0, rows, size)
    ]
    return listed if seed is None else sorted(listed, key=lambda w: _lot(seed, w))


def _lot(seed: int, window: Wanted) -> bytes:
    return hashlib.blake2b(f"{seed} {window.print} {window.start}".encode()).digest()


def remaining(
    wanted: Sequence[Wanted],
    recorded: Sequence[RecordedShard],
    where: str | None,
    seed: int | None,
) -> Iterator[Piece]:
    """What is wanted and not recorded, as pieces in the order of `wanted`; see the rule above."""
    known: dict[str, list[Piece]] = {}
    for entry in recorded:
        piece = Piece.of(entry.shard)
        known.setdefault(piece.print, []).append(piece)
    gaps = {print_: _gaps(pieces, where) for print_, pieces in known.items()}
    starts = {print_: [gap.start for gap in found] for print_, found in gaps.items()}
    for window in wanted:
        everything = Piece(window.print, 0, window.stop, window.name)
        open_ = gaps.get(window.print, [everything])
        first = bisect_right(starts.get(window.print, [0]), window.start) - 1
        for index in range(max(first, 0), len(open_)):
            gap = open_[index]
            if gap.start >= window.stop:
                break
            start, stop = max(gap.start, window.start), min(gap.stop, window.stop)
            if start < stop:
                yield replace(gap, start=start, stop=stop, name=window.name, where=where, seed=seed)


END = 1 << 62
"""Beyond the last row of any file."""


def _gaps(pieces: Sequence[Piece], where: str | None) -> list[Piece]:
    """The ranges of a file that may hold rows not yet recorded, with the conditions to leave out."""
    print_ = pieces[0].print
    edges = sorted({0, END, *(e for piece in pieces for e in (piece.start, piece.stop))})
    waiting = sorted(pieces, key=lambda piece: piece.start, reverse=True)
    over: list[Piece] = []
    found: list[Piece] = []
    for low, high in pairwise(edges):
        while waiting and waiting[-1].start <= low:
            over.append(waiting.pop())
        over = [piece for piece in over if piece.stop > low]
        # A piece "without" others was listed because those others were recorded on its range, so
        # together they cover all rows for which any of their conditions is true.
        conditions = {piece.where for piece in over}
        if None in conditions or (where is not None and where in conditions):
            continue
        without = tuple(sorted(text for text in conditions if text is not None))
        if found and found[-1].stop == low and found[-1].without == without:
            found[-1] = replace(found[-1], stop=high)
        else:
            found.append(Piece(print_, low, high, "", where, without))
    return found


def pending(recorded: Sequence[RecordedShard], reachable: Iterable[str]) -> tuple[list[Shard], int]:
    """Shards planned earlier whose file is among these fingerprints, and how many are not."""
    here = set(reachable)
    waiting = [entry.shard for entry in recorded if entry.inputs is None]
    found = [shard for shard in waiting if Piece.of(shard).print in here]
    return found, len(waiting) - len(found)
