"""Which rows of a file a shard takes, and the rule that no row is ever taken twice.

A file is known by its fingerprint and a row by its number in it. A `RowRange` is a range of rows,
those of them for which `where` is true and none of `without` is; `seed` orders them. All of it
stands in the shard's members, so the ledger fixes it:

    "FINGERPRINT START STOP NAME", "where EXPR", "without EXPR", …, "shuffle SEED"

The rule: the options of a build say which rows are wanted (the first `--limit` rows of the source's
order, shuffled or not, for which `--where` is true). What the ledger has recorded is taken off:
where a range was recorded with the same condition or with none, nothing of it is left; where it was
recorded under other conditions, what is left is a new range `without` those. So the same options go
on where they stopped, and other options add the rows that were not wanted before, and no others.
`RowSelection` holds the options and applies the rule, for every source whose shards are ranges.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TypeVar

import numpy as np

from arrag_runtime.format.errors import BadInputError
from schemas.records import RecordedShard, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.files import SourceFile, find_file, find_files
from stages.sources.reading.fingerprint import make_shard
from stages.sources.reading.where import parse_where

_Row = TypeVar("_Row")
_END = 1 << 62
"""Beyond the last row of any file."""


@dataclass(frozen=True)
class RowRange:
    """Rows start..stop of the file with this fingerprint; see the module."""

    print: str
    """The file's fingerprint."""
    start: int
    """The number of its first row, from 0."""
    stop: int
    """The number after its last row."""
    name: str
    """The file's name, for messages and to look for the file."""
    where: str | None = None
    """The condition that is true for the rows that are taken; None for all of them."""
    without: tuple[str, ...] = ()
    """Conditions that are true for none of the rows that are taken."""
    seed: int | None = None
    """What shuffles the rows; None for the order of the file."""

    @property
    def is_plain(self) -> bool:
        """Whether every row of the range is taken, in order."""
        return self.where is None and not self.without and self.seed is None

    def members(self) -> tuple[str, ...]:
        """As the ledger keeps it."""
        conditions = [f"where {self.where}"] if self.where is not None else []
        conditions += [f"without {other}" for other in self.without]
        conditions += [f"shuffle {self.seed}"] if self.seed is not None else []
        return (f"{self.print} {self.start} {self.stop} {self.name}", *conditions)

    def shard(self, source: str) -> Shard:
        """The shard of this range alone."""
        return make_shard(source, self.members())

    @staticmethod
    def of(shard: Shard) -> "RowRange":
        """The range that a shard's members describe."""
        print_, start, stop, name = shard.members[0].split(" ", 3)
        tags = [member.split(" ", 1) for member in shard.members[1:]]
        where = next((text for tag, text in tags if tag == "where"), None)
        seed = next((int(text) for tag, text in tags if tag == "shuffle"), None)
        without = tuple(text for tag, text in tags if tag == "without")
        return RowRange(print_, int(start), int(stop), name, where, without, seed)

    def in_order(self, rows: Iterable[_Row]) -> Iterator[_Row]:
        """The rows that it takes as the shard has them: in the file's order or a drawn one.

        A shuffled shard is held whole; its size is bounded as any shard's. Where reading `rows`
        raises, what came before is handed out first.
        """
        if self.seed is None:
            yield from rows
            return
        held: list[_Row] = []
        fault = None
        try:
            held.extend(rows)
        except Exception as error:
            fault = error
        mixed = [self.seed, self.start, int.from_bytes(self.print.encode(), "big") % 2**32]
        for index in np.random.default_rng(mixed).permutation(len(held)):
            yield held[index]
        if fault is not None:
            raise fault


class RowSelection:
    """Which rows of which files are wanted, as the settings say.

    inputs: located paths, patterns and hub addresses. endings: those of the files that are looked
    for below a folder. Raises BadInputError for a condition that cannot be read.
    """

    def __init__(
        self, settings: SourceSettings, inputs: Sequence[str], endings: tuple[str, ...]
    ) -> None:
        self.limit, self.seed = settings.limit, settings.shuffle_seed
        self.where = parse_where(settings.where).text if settings.where is not None else None
        self._source, self._inputs, self._endings = settings.name, inputs, endings

    def files(self) -> dict[str, SourceFile]:
        """The files by their fingerprints, in order. Raises BadInputError for an input without."""
        return {file.print: file for file in find_files(self._inputs, self._endings, self._source)}

    def file_of(self, rows: RowRange) -> SourceFile:
        """The file of a range. Raises BadInputError where it is not there any more."""
        file = find_file(self._inputs, self._endings, self._source, rows.name, rows.print)
        if file is None:
            raise BadInputError(
                f"the file {rows.name} of this shard is not in --input any more, or has changed;"
                " every node must see it at the same place"
            )
        return file

    def at_most(self, inputs: int) -> int:
        """So many inputs, or as many as the limit allows."""
        return inputs if self.limit is None else min(inputs, self.limit)

    def missing(
        self,
        files: Iterable[tuple[str, int, str, int]],
        recorded: Sequence[RecordedShard],
        numbers: Callable[[RowRange], Iterable[int]],
        damaged: Container[str] = (),
    ) -> list[RowRange]:
        """What is wanted of these files and not recorded, in the order of the source.

        files: (fingerprint, rows, name, rows per window). numbers: the numbers of the rows that a
        range takes; asked under a limit only. damaged: fingerprints of files that are one reject
        whatever the conditions are; these come last. A seed shuffles the windows of all files, each
        by a hash of its own, so that a file more or less moves none of the others.
        """
        wanted = [
            RowRange(print_, start, min(start + size, rows), name)
            for print_, rows, name, size in files
            for start in range(0, rows, size)
        ]
        if self.seed is not None:
            wanted.sort(key=self._lot)
        if self.limit is not None:
            wanted = list(self._first(wanted, self.limit, numbers))
        sound = [window for window in wanted if window.print not in damaged]
        broken = [window for window in wanted if window.print in damaged]
        return [
            *_remaining(sound, recorded, self.where, self.seed),
            *_remaining(broken, recorded, None, None),
        ]

    def _lot(self, window: RowRange) -> bytes:
        return hashlib.blake2b(f"{self.seed} {window.print} {window.start}".encode()).digest()

    def _first(
        self, wanted: Sequence[RowRange], limit: int, numbers: Callable[[RowRange], Iterable[int]]
    ) -> Iterator[RowRange]:
        """The windows up to the `limit`th row that is taken, the last one cut after it."""
        for window in wanted:
            if limit <= 0:
                return
            found = list(islice(numbers(replace(window, where=self.where)), limit))
            yield replace(window, stop=found[-1] + 1) if len(found) == limit else window
            limit -= len(found)


def _remaining(
    wanted: Sequence[RowRange],
    recorded: Sequence[RecordedShard],
    where: str | None,
    seed: int | None,
) -> Iterator[RowRange]:
    """What is wanted and not recorded, as ranges in the order of `wanted`; see the rule above."""
    known: dict[str, list[RowRange]] = {window.print: [] for window in wanted}
    for rows in (RowRange.of(entry.shard) for entry in recorded):
        known.setdefault(rows.print, []).append(rows)
    gaps = {print_: _gaps(print_, ranges, where) for print_, ranges in known.items()}
    for window in wanted:
        open_ = gaps[window.print]
        first = bisect_right(open_, window.start, key=lambda gap: gap.start) - 1
        for gap in islice(open_, max(first, 0), None):
            if gap.start >= window.stop:
                break
            start, stop = max(gap.start, window.start), min(gap.stop, window.stop)
            if start < stop:
                yield replace(gap, start=start, stop=stop, name=window.name, where=where, seed=seed)


def _gaps(print_: str, ranges: Sequence[RowRange], where: str | None) -> list[RowRange]:
    """The ranges of a file that may hold rows not yet recorded, with the conditions to leave out."""
    edges = sorted({0, _END, *(e for rows in ranges for e in (rows.start, rows.stop))})
    waiting = sorted(ranges, key=lambda rows: rows.start, reverse=True)
    over: list[RowRange] = []
    found: list[RowRange] = []
    for low, high in pairwise(edges):
        while waiting and waiting[-1].start <= low:
            over.append(waiting.pop())
        over = [rows for rows in over if rows.stop > low]
        # A range "without" others was listed because those others were recorded on its range, so
        # together they cover all rows for which any of their conditions is true.
        conditions = {rows.where for rows in over}
        if None in conditions or (where is not None and where in conditions):
            continue
        without = tuple(sorted(text for text in conditions if text is not None))
        if found and found[-1].stop == low and found[-1].without == without:
            found[-1] = replace(found[-1], stop=high)
        else:
            found.append(RowRange(print_, low, high, "", where, without))
    return found


def pending(
    recorded: Sequence[RecordedShard], reachable: Container[str]
) -> tuple[list[Shard], list[str]]:
    """Shards planned earlier whose file is among these fingerprints, and a note of the others."""
    waiting = [entry.shard for entry in recorded if entry.inputs is None]
    found = [shard for shard in waiting if RowRange.of(shard).print in reachable]
    lost = len(waiting) - len(found)
    return found, [f"{lost} shards planned earlier are not in this --input"] if lost else []
