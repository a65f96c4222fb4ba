"""The `cc12m` source: lines `address<TAB>caption`, as Conceptual 12M is published.

--input: a tsv file, plain or gzip, as a path or an http(s) address; without it the publisher's. The
list is read as a stream, 10,000 lines a shard. A shard's id comes from the content of its lines and
their place, so a list that moved, was packed or grew at its end keeps its shards. Its members say
where its bytes begin and end: a worker reads those alone (of a gzip file it has to skip what comes
before). The file must lie where every node sees it. Every line is an input; one that names no
picture is a reject.
"""

import csv
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from arrag_runtime.format.errors import BadInputError
from schemas.records import Count, LinkRecord, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.columns import Record
from stages.sources.reading.files import SourceFile, find_file, find_files
from stages.sources.reading.fingerprint import make_shard, require_input, require_shard_size
from stages.sources.reading.row_ranges import Piece, Wanted, pending, remaining, windows
from stages.sources.reading.text_lines import (
    Line,
    Scan,
    is_packed,
    lines_from,
    packed_size,
    scan_lines,
)
from stages.sources.reading.where import parse_where, table_of, taken

PUBLISHED = "https://storage.googleapis.com/conceptual_12m/cc12m.tsv"
ENDINGS = (".tsv", ".tsv.gz")
COLUMNS = ("url", "caption")
LINES_A_SHARD = 10_000
LINES_AT_ONCE = 1000
SAMPLE = 1 << 20
"""Bytes read to estimate how many lines a file has."""


@dataclass(frozen=True)
class Extent:
    """Where the lines of a shard are: bytes of the unpacked file, and the hash of the lines."""

    begin: int
    end: int
    content: str

    def members(self) -> tuple[str, str]:
        """As the ledger keeps it, after the piece's first member."""
        return (f"bytes {self.begin} {self.end}", f"content {self.content}")

    @staticmethod
    def of(shard: Shard) -> "Extent":
        """The extent that a shard's members describe."""
        tags = dict(member.split(" ", 1) for member in shard.members[1:3])
        begin, end = tags["bytes"].split(" ")
        return Extent(int(begin), int(end), tags["content"])


class Cc12mSource:
    """See the module. The input is located: a publisher's list has been fetched."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._limit, self._seed = settings.limit, settings.shuffle_seed
        require_shard_size(settings.shard_size)
        self._size = settings.shard_size or LINES_A_SHARD
        self._inputs = require_input(self.name, settings.input)
        self._where: str | None = None
        if settings.where is not None:
            expression = parse_where(settings.where)
            expression.require(COLUMNS)
            expression.mask(table_of([dict.fromkeys(COLUMNS, "")]))
            self._where = expression.text

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """See `Source.listing`. A file that is recorded to its end is not read again."""
        files = find_files(self._inputs, ENDINGS, self.name)
        prints = {file.print for file in files}
        reachable, lost = pending(recorded, prints)
        here = [r for r in recorded if Piece.of(r.shard).print in prints]
        elsewhere = [r for r in recorded if Piece.of(r.shard).print not in prints]
        spans = {(p.start, p.stop) for p in (Piece.of(r.shard) for r in elsewhere)}
        first = self._limit if self._seed is None and self._where is None else None
        if first is not None:
            # A shard of other options may begin before the limit and end after it.
            first = max([first, *(stop for start, stop in spans if start < first)])
        scans: dict[str, tuple[SourceFile, Scan]] = {}
        for file in files:
            # Under a limit its lines count, recorded or not.
            if self._limit is None and _recorded_to_the_end(file, here, self._where):
                continue
            scan = scan_lines(file, self._size, spans, stop=first)
            scans[file.print] = (file, scan)
            for entry in elsewhere:
                if moved := _same_lines(entry.shard, file, scan):
                    here.append(replace(entry, shard=moved))
                    if entry.inputs is None:
                        reachable, lost = [*reachable, moved], lost - 1
        wanted = windows(
            [(p, scan.lines, file.name, self._size) for p, (file, scan) in scans.items()],
            self._seed,
        )
        if self._limit is not None:
            wanted = list(self._first(wanted, self._limit, scans))
        pieces = remaining(wanted, here, self._where, self._seed)
        known = {entry.shard.id for entry in recorded}
        fresh = (self._shard(*scans[piece.print], piece) for piece in pieces)
        notes = [f"{lost} shards planned earlier are not in this --input"] if lost > 0 else []
        return Listing(reachable + [s for s in fresh if s.id not in known], notes)

    def read(self, shard: Shard) -> Iterator[Record]:
        """See `Source.read`."""
        piece, extent = Piece.of(shard), Extent.of(shard)
        file = find_file(self._inputs, ENDINGS, self.name, piece.name, piece.print)
        if file is None:
            raise BadInputError(
                f"the list {piece.name} of shard {shard.id} is not in --input any more, or has"
                " changed; every node must see it at the same place"
            )
        found = _taken(file, piece, extent.begin)
        if piece.seed is not None:
            held = list(found)
            found = (held[index] for index in piece.order(len(held)))
        for row, (number, line) in enumerate(found):
            yield to_link(row, str(number), line)

    def count(self) -> Count:
        """See `Source.count`: by the files' sizes and the first lines of each."""
        total, exact, seen, passed = 0, True, 0, 0
        for file in find_files(self._inputs, ENDINGS, self.name):
            lines, consumed, whole = _sample(file)
            total += len(lines) if whole else round(len(lines) * file.size / max(consumed, 1))
            exact &= whole
            seen += len(lines)
            if self._where is not None and lines:
                passed += int(taken(table_of([_fields(line) for line in lines]), self._where).sum())
        notes = [] if exact else ["lines estimated from sizes and a sample"]
        if self._where is not None:
            total, exact = round(total * passed / max(seen, 1)), False
            notes.append(f"{passed:,} of {seen:,} lines looked at pass --where")
        limited = total if self._limit is None else min(total, self._limit)
        return Count(limited, exact, "; ".join(notes), links=True)

    def _first(
        self, wanted: Sequence[Wanted], limit: int, scans: dict[str, tuple[SourceFile, Scan]]
    ) -> Iterator[Wanted]:
        """The windows up to the `limit`th line that is taken, the last one cut after it."""
        for window in wanted:
            if limit <= 0:
                return
            if self._where is None:
                yield replace(window, stop=min(window.stop, window.start + limit))
                limit -= window.stop - window.start
                continue
            file, scan = scans[window.print]
            piece = Piece(window.print, window.start, window.stop, window.name, self._where)
            found = _taken(file, piece, scan.offsets[window.start])
            numbers = [number for number, _ in islice(found, limit)]
            cut = numbers[-1] + 1 if len(numbers) == limit else window.stop
            yield replace(window, stop=cut)
            limit -= len(numbers)

    def _shard(self, file: SourceFile, scan: Scan, piece: Piece) -> Shard:
        """The shard of a piece: its id from its lines, their place and its conditions."""
        span = (piece.start, piece.stop)
        if span not in scan.digests:
            near = max(number for number in scan.offsets if number <= piece.start)
            begin = (near, scan.offsets[near])
            scan = scan_lines(file, None, {span}, first=begin, stop=piece.stop)
        extent = Extent(scan.offsets[span[0]], scan.offsets[span[1]], scan.digests[span])
        head, *conditions = piece.members()
        identity = make_shard(
            self.name, [f"{piece.start} {piece.stop} {extent.content}", *conditions]
        )
        return Shard(self.name, identity.id, (head, *extent.members(), *conditions))


def _recorded_to_the_end(
    file: SourceFile, recorded: Sequence[RecordedShard], where: str | None
) -> bool:
    """Whether the ledger has every line of a plain file under this condition, or under none."""
    reached = end = 0
    shards = (r.shard for r in recorded if Piece.of(r.shard).print == file.print)
    for shard in sorted(shards, key=lambda shard: Piece.of(shard).start):
        piece = Piece.of(shard)
        if piece.where in (None, where) and piece.start <= reached < piece.stop:
            reached, end = piece.stop, Extent.of(shard).end
    return end == file.size and not is_packed(file)


def _same_lines(shard: Shard, file: SourceFile, scan: Scan) -> Shard | None:
    """A shard of another file as one of this file, where the same lines stand at its place."""
    piece, extent = Piece.of(shard), Extent.of(shard)
    if scan.digests.get((piece.start, piece.stop)) != extent.content:
        return None
    there = Extent(scan.offsets[piece.start], scan.offsets[piece.stop], extent.content)
    head, *conditions = replace(piece, print=file.print, name=file.name).members()
    return Shard(shard.source, shard.id, (head, *there.members(), *conditions))


def _taken(file: SourceFile, piece: Piece, offset: int) -> Iterator[tuple[int, Line]]:
    """The lines a piece takes, with their numbers in the file; `offset` is its first byte."""
    number = piece.start
    with closing(lines_from(file, offset)) as stream:
        lines = islice(stream, piece.stop - piece.start)
        while few := list(islice(lines, LINES_AT_ONCE)):
            mask = np.ones(len(few), bool)
            if piece.where is not None or piece.without:
                table = table_of([_fields(line) for line in few])
                mask = taken(table, piece.where, piece.without)
            for line, wanted in zip(few, mask, strict=True):
                if wanted:
                    yield number, line
                number += 1


def to_link(row: int, key: str, line: Line) -> LinkRecord | Reject:
    """A line as a picture to be fetched, or why it names none. `key` is the line's number."""
    address, tab, caption = line.data.partition(b"\t")
    fault = line.fault
    url = ""
    if fault is None and not line.data.strip():
        fault = "the line is empty"
    elif fault is None and not tab:
        fault = "no tab"
    elif fault is None:
        try:
            url = address.decode().strip().strip('"').strip()
            fault = None if url else "no address before the tab"
        except UnicodeDecodeError:
            fault = "the address is no UTF-8"
    if fault is not None:
        return Reject(row, key, "read", "bad-line", f"{fault}: {line.data[:80]!r}")
    return LinkRecord(row, key, url, _caption(caption))


def _caption(data: bytes) -> str | None:
    """The text after the first tab; quoted as CSV does, it may hold tabs and doubled quotes."""
    text = data.decode("utf-8", "replace").strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        parsed = next(csv.reader([text], delimiter="\t"), [])
        text = parsed[0] if len(parsed) == 1 else text
    return text.strip() or None


def _fields(line: Line) -> dict[str, Any]:
    """The line's columns, as conditions see them."""
    found = to_link(0, "", line)
    if isinstance(found, LinkRecord):
        return {"url": found.url, "caption": found.caption}
    return dict.fromkeys(COLUMNS)


def _sample(file: SourceFile) -> tuple[list[Line], int, bool]:
    """The first lines of a file, the bytes of the file they took, and whether they are all."""
    lines = []
    read = 0
    with closing(lines_from(file, 0)) as stream:
        for line in stream:
            lines.append(line)
            read += len(line.data) + 1
            if read > SAMPLE:
                break
        else:
            return lines, file.size, True
    return lines, packed_size(file, read) if is_packed(file) else read, False
