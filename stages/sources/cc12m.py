"""The `cc12m` source: lines `address<TAB>caption`, as Conceptual 12M is published.

--input: a tsv file, plain or gzip, as a path or an http(s) address; without it the publisher's. The
list is read as a stream, 10,000 lines per shard. A shard's id comes from the content of its lines
and their place, so a list that moved, was packed or grew at its end keeps its shards. Its members
say where its bytes begin and end: a worker reads those alone (of a gzip file it has to skip what
comes before). The file must lie where every node sees it. Every line is an input; one that names no
picture is a reject.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import Any

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.location import cache_folder
from schemas.records import Count, LinkRecord, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.columns import Record
from stages.sources.reading.files import SourceFile, local_inputs
from stages.sources.reading.fingerprint import make_shard
from stages.sources.reading.publisher import fetch_published
from stages.sources.reading.row_ranges import RowRange, RowSelection, pending
from stages.sources.reading.source_kind import SourceKind
from stages.sources.reading.text_lines import Line, Scan, head_of, is_packed, lines_from, scan_lines
from stages.sources.reading.where import parse_where, table_of, taken

_PUBLISHED = "https://storage.googleapis.com/conceptual_12m/cc12m.tsv"
_PUBLISHED_LINES = 12_423_374
_ENDINGS = (".tsv", ".tsv.gz")
_COLUMNS = ("url", "caption")
_LINES_PER_SHARD = 10_000
_LINES_AT_ONCE = 1000


@dataclass(frozen=True)
class Extent:
    """Where a shard's lines begin and end in the unpacked file, in bytes, and their hash (hex)."""

    begin: int
    end: int
    content: str

    @staticmethod
    def of(shard: Shard) -> "Extent":
        """The extent that a shard's members describe."""
        tags = dict(member.split(" ", 1) for member in shard.members[1:3])
        begin, end = tags["bytes"].split(" ")
        return Extent(int(begin), int(end), tags["content"])


class Cc12mSource:
    """A `Source` of lists of addresses and captions, a line per picture; a publisher's list has been fetched."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._selection = RowSelection(settings, settings.input, _ENDINGS)
        self._size = settings.shard_size or _LINES_PER_SHARD
        if settings.where is not None:
            parse_where(settings.where).strict_mask(table_of([dict.fromkeys(_COLUMNS, "")]))

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """A file that is recorded to its end is not read again."""
        selection = self._selection
        files = selection.files()
        here = [r for r in recorded if RowRange.of(r.shard).print in files]
        elsewhere = [r for r in recorded if RowRange.of(r.shard).print not in files]
        spans = {(r.start, r.stop) for r in (RowRange.of(r.shard) for r in elsewhere)}
        first = selection.limit if selection.seed is None and selection.where is None else None
        if first is not None:
            # A shard of other options may begin before the limit and end after it.
            first = max([first, *(stop for start, stop in spans if start < first)])
        scans: dict[str, Scan] = {}
        for print_, file in files.items():
            # Under a limit its lines count, recorded or not.
            if selection.limit is None and _recorded_to_the_end(file, here, selection.where):
                continue
            scans[print_] = scan_lines(file, self._size, spans, stop=first)
            moved = (_same_lines(entry, file, scans[print_]) for entry in elsewhere)
            here += [entry for entry in moved if entry is not None]
        ranges = selection.missing(
            [(p, scan.lines, files[p].name, self._size) for p, scan in scans.items()],
            here,
            lambda lines: self._numbers(files[lines.print], scans[lines.print], lines),
        )
        found = {entry.shard.id for entry in here}
        left = [entry for entry in elsewhere if entry.shard.id not in found]
        reachable, lost = pending([*here, *left], files)
        known = {entry.shard.id for entry in recorded}
        fresh = (self._shard(files[r.print], scans[r.print], r) for r in ranges)
        return Listing(reachable + [shard for shard in fresh if shard.id not in known], lost)

    def read(self, shard: Shard) -> Iterator[Record]:
        lines = RowRange.of(shard)
        file = self._selection.file_of(lines)
        found = lines.in_order(_taken(file, lines, Extent.of(shard).begin))
        for row, (number, line) in enumerate(found):
            yield _to_link(row, str(number), line)

    def count(self) -> Count:
        """By the files' sizes and the first lines of each."""
        selection = self._selection
        total, exact, seen, passed = 0, True, 0, 0
        for file in selection.files().values():
            lines, consumed, whole = head_of(file)
            total += len(lines) if whole else round(len(lines) * file.size / max(consumed, 1))
            exact &= whole
            seen += len(lines)
            if selection.where is not None and lines:
                table = table_of([_fields(line) for line in lines])
                passed += int(taken(table, selection.where).sum())
        notes = [] if exact else ["lines estimated from sizes and a sample"]
        if selection.where is not None:
            total, exact = round(total * passed / max(seen, 1)), False
            notes.append(f"{passed:,} of {seen:,} lines looked at pass --where")
        return Count(selection.at_most(total), exact, "; ".join(notes), links=True)

    def _numbers(self, file: SourceFile, scan: Scan, lines: RowRange) -> Iterable[int]:
        """The numbers of the lines that a range takes."""
        if lines.where is None:
            return range(lines.start, lines.stop)
        return (number for number, _ in _taken(file, lines, scan.offsets[lines.start]))

    def _shard(self, file: SourceFile, scan: Scan, lines: RowRange) -> Shard:
        """The shard of a range: its id from its lines, their place and its conditions."""
        span = (lines.start, lines.stop)
        if span not in scan.digests:
            near = max(number for number in scan.offsets if number <= lines.start)
            begin = (near, scan.offsets[near])
            scan = scan_lines(file, None, {span}, first=begin, stop=lines.stop)
        members = _members(lines, scan)
        named = (f"{lines.start} {lines.stop} {scan.digests[span]}", *members[3:])
        return replace(make_shard(self.name, named), members=members)


def _members(lines: RowRange, scan: Scan) -> tuple[str, ...]:
    """A range as the ledger keeps it: with the place of its lines and what they are."""
    head, *conditions = lines.members()
    place = f"bytes {scan.offsets[lines.start]} {scan.offsets[lines.stop]}"
    return (head, place, f"content {scan.digests[lines.start, lines.stop]}", *conditions)


def _recorded_to_the_end(
    file: SourceFile, recorded: Sequence[RecordedShard], where: str | None
) -> bool:
    """Whether the ledger has every line of a plain file under this condition, or under none."""
    reached = end = 0
    shards = (r.shard for r in recorded if RowRange.of(r.shard).print == file.print)
    for shard in sorted(shards, key=lambda shard: RowRange.of(shard).start):
        lines = RowRange.of(shard)
        if lines.where in (None, where) and lines.start <= reached < lines.stop:
            reached, end = lines.stop, Extent.of(shard).end
    return end == file.size and not is_packed(file)


def _same_lines(entry: RecordedShard, file: SourceFile, scan: Scan) -> RecordedShard | None:
    """A shard of another file as one of this file, where the same lines stand at its place."""
    lines = RowRange.of(entry.shard)
    if scan.digests.get((lines.start, lines.stop)) != Extent.of(entry.shard).content:
        return None
    members = _members(replace(lines, print=file.print, name=file.name), scan)
    return replace(entry, shard=replace(entry.shard, members=members))


def _taken(file: SourceFile, lines: RowRange, offset: int) -> Iterator[tuple[int, Line]]:
    """The lines a range takes, with their numbers in the file; `offset` is its first byte."""
    with closing(lines_from(file, offset)) as stream:
        numbered = zip(range(lines.start, lines.stop), stream, strict=False)
        while few := list(islice(numbered, _LINES_AT_ONCE)):
            if lines.where is not None or lines.without:
                table = table_of([_fields(line) for _, line in few])
                few = list(compress(few, taken(table, lines.where, lines.without)))
            yield from few


def _to_link(row: int, key: str, line: Line) -> LinkRecord | Reject:
    """A line as a picture to be fetched, or why it names none. `key` is the line's number."""
    address, tab, caption = line.data.partition(b"\t")
    fault = line.fault
    if fault is None and not tab:
        fault = "no tab" if line.data.strip() else "the line is empty"
    if fault is None:
        try:
            if url := address.decode().strip().strip('"').strip():
                return LinkRecord(row, key, url, _caption(caption))
            fault = "no address before the tab"
        except UnicodeDecodeError:
            fault = "the address is no UTF-8"
    return Reject(row, key, "read", "bad-line", f"{fault}: {line.data[:80]!r}")


def _caption(data: bytes) -> str | None:
    """The text after the first tab; quoted as CSV does, it may hold tabs and doubled quotes."""
    text = data.decode("utf-8", "replace").strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        parsed = next(csv.reader([text], delimiter="\t"), [])
        text = parsed[0] if len(parsed) == 1 else text
    return text.strip() or None


def _fields(line: Line) -> dict[str, Any]:
    """The line's columns, as conditions see them."""
    found = _to_link(0, "", line)
    return {name: getattr(found, name, None) for name in _COLUMNS}


def _is_address(given: str) -> bool:
    return given.startswith(("http://", "https://"))


def _locate(settings: SourceSettings) -> tuple[str, ...]:
    """The lists' paths, those that are given by address being fetched."""
    cache = cache_folder(settings.cache)
    paths = (
        str(fetch_published(given, cache)) if _is_address(given) else given
        for given in settings.input or (_PUBLISHED,)
    )
    return local_inputs(replace(settings, input=tuple(paths)))


def _unfetched(settings: SourceSettings) -> Count | None:
    """What the publisher says of its list. Raises BadInputError for what takes a look into one."""
    if settings.input and not any(map(_is_address, settings.input)):
        return None
    if settings.input or settings.where is not None:
        raise BadInputError(
            "a plan fetches no list, and so cannot look into it; fetch it yourself and pass its"
            " path with --input"
        )
    lines = min(_PUBLISHED_LINES, settings.limit or _PUBLISHED_LINES)
    return Count(lines, exact=False, note="as many lines as its publisher says", links=True)


SOURCE = SourceKind(open=Cc12mSource, locate=_locate, reads=_ENDINGS, unfetched=_unfetched)
