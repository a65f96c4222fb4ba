"""Lines of large text files: counted, hashed and found again without holding the file.

In: a plain or gzip file. Out: for ranges of lines their byte offsets (in the unpacked file) and
hashes, in one pass; or the lines of a range, read from its first byte on. The end of a last line
is not hashed, so that a file that grew keeps the hashes of what it had.
"""

import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.sources.reading.files import SourceFile, require_reached

Span = tuple[int, int]
"""A first line and the line after the last one."""
_CHUNK = 4 << 20
_PACKED_CHUNK = 1 << 12
LONGEST_LINE = 1 << 20
"""A longer line is cut, so that a file without ends of lines cannot fill the memory."""
_SHOWN = 1000
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Line:
    """A line of a file."""

    data: bytes
    """The line without its end, or its beginning where it has a fault."""
    fault: str | None = None
    """Why it is not the line as it stands in the file."""


@dataclass
class Scan:
    """What one pass over a file found."""

    lines: int = 0
    """How many lines there are, up to where the pass ended."""
    offsets: dict[int, int] = field(default_factory=dict)
    """The byte of the unpacked file with which a line begins, by the line's number."""
    digests: dict[Span, str] = field(default_factory=dict)
    """The hash of a span of lines, 16 hex digits."""


_DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a damaged file raises."""


def unpacked(file: SourceFile) -> Any:
    """The file's bytes, unpacked where it is packed, whatever its name says."""
    stream = file.open()
    packed = stream.read(2) == _GZIP
    stream.seek(0)
    return gzip.GzipFile(fileobj=stream) if packed else stream


def is_packed(file: SourceFile) -> bool:
    """Whether the file is gzip, so that offsets are not those of its bytes on disk."""
    with file.open() as stream:
        return bool(stream.read(2) == _GZIP)


def packed_size(file: SourceFile, unpacked_bytes: int) -> int:
    """How many bytes of a gzip file hold its first so many unpacked ones, to a few kilobytes."""
    consumed = made = 0
    # What is damaged counts for nothing here; reading the lines tells of it.
    with closing(file.open()) as stream, suppress(zlib.error):
        member = zlib.decompressobj(wbits=31)
        while made < unpacked_bytes and (chunk := stream.read(_PACKED_CHUNK)):
            consumed += len(chunk)
            while chunk:
                made += len(member.decompress(chunk))
                chunk = member.unused_data
                if member.eof:
                    member = zlib.decompressobj(wbits=31)
    return consumed


def lines_from(file: SourceFile, offset: int) -> Generator[Line, None, None]:
    """The lines from this byte of the unpacked file on; a damaged file ends with one faulty line.

    Of a gzip file everything before `offset` is unpacked and skipped.
    """
    rest, cut = b"", False
    with closing(unpacked(file)) as stream:
        try:
            stream.seek(offset)
            for chunk in _chunks(stream):
                *lines, rest = (rest + chunk).split(b"\n")
                for data in lines:
                    yield _line(data, cut)
                    cut = False
                if len(rest) > LONGEST_LINE:
                    rest, cut = rest[:_SHOWN], True
        except _DAMAGE as error:
            require_reached(file, error)
            reason = f"{type(error).__name__}: {error}"
            yield Line(rest[:_SHOWN], f"the list is damaged here ({reason})")
            return
    if rest:
        yield _line(rest, cut)


def _line(data: bytes, cut: bool) -> Line:
    if cut or len(data) > LONGEST_LINE:
        return Line(data[:_SHOWN], f"longer than {LONGEST_LINE} bytes")
    return Line(data.removesuffix(b"\r"))


def scan_lines(
    file: SourceFile,
    size: int | None,
    spans: set[Span],
    *,
    first: tuple[int, int] = (0, 0),
    stop: int | None = None,
) -> Scan:
    """One pass over a file for its windows of `size` lines (none for None) and for these spans.

    first: the line and byte to begin with. stop: the line after which to end. A damaged file ends
    with its damage, which counts as one line.
    """
    scan = _Scanner(size, spans, first, stop)
    with closing(unpacked(file)) as stream:
        try:
            stream.seek(first[1])
            for chunk in _chunks(stream):
                if not scan.feed(chunk):
                    return scan.end(damaged=False)
        except _DAMAGE as error:
            require_reached(file, error)
            return scan.end(damaged=True)
    return scan.end(damaged=False)


class _Scanner:
    """The state of one pass; see `scan_lines`."""

    def __init__(
        self, size: int | None, spans: set[Span], first: tuple[int, int], stop: int | None
    ) -> None:
        self._size, self._stop = size, stop
        self._spans = spans
        self._starts: dict[int, list[Span]] = {}
        for span in spans:
            self._starts.setdefault(span[0], []).append(span)
        edges = {edge for span in spans for edge in span} | ({stop} if stop is not None else set())
        self._edges = deque(sorted(edges))
        self._number, self._at = first
        self._carry = b""
        self._open: dict[Span, Any] = {}
        self._scan = Scan()
        self._reach(self._number, self._at)

    def feed(self, chunk: bytes) -> bool:
        """Take in the next bytes; False when `stop` was reached."""
        # The last byte waits: an end of line that closes a span is not hashed.
        data = self._carry + chunk
        ends = np.flatnonzero(np.frombuffer(data, np.uint8)[:-1] == 10)
        start = 0
        while (mark := self._next_mark()) is not None and mark - self._number <= len(ends):
            end = int(ends[mark - self._number - 1])
            self._hash(data[start:end])
            ends = ends[mark - self._number :]
            self._number = mark
            start = end + 1
            self._close(mark)
            self._hash(b"\n")
            self._reach(mark, self._at + start)
            if mark == self._stop:
                self._at, self._carry = self._at + start, b""
                return False
        self._number += len(ends)
        self._hash(data[start:-1])
        self._at += len(data) - 1
        self._carry = data[-1:]
        return True

    def end(self, *, damaged: bool) -> Scan:
        """The result, with spans that end where the file does."""
        self._at += len(self._carry)
        if self._carry not in (b"", b"\n"):
            self._hash(self._carry)
        partial = self._carry not in (b"", b"\n")
        self._number += (self._carry == b"\n") + (partial or damaged)
        self._scan.lines = self._number
        self._scan.offsets[self._number] = self._at
        for span in [s for s in self._open if s[0] < self._number]:
            if span in self._spans and span[1] > self._number:
                continue
            digest = self._open[span].hexdigest()
            self._scan.digests[span[0], self._number] = digest
        return self._scan

    def _next_mark(self) -> int | None:
        """The next line number at which something begins or ends."""
        while self._edges and self._edges[0] <= self._number:
            self._edges.popleft()
        marks = [self._edges[0]] if self._edges else []
        if self._size:
            marks.append((self._number // self._size + 1) * self._size)
        return min(marks, default=None)

    def _reach(self, number: int, offset: int) -> None:
        """Begin the spans and the window that start here."""
        self._scan.offsets[number] = offset
        starting = set(self._starts.get(number, ()))
        if self._size and number % self._size == 0:
            starting.add((number, number + self._size))
        for span in starting:
            self._open[span] = hashlib.blake2b(digest_size=8)

    def _close(self, number: int) -> None:
        for span in [s for s in self._open if s[1] == number]:
            self._scan.digests[span] = self._open.pop(span).hexdigest()
        if number == self._stop:
            for span, state in self._open.items():
                self._scan.digests[span[0], number] = state.hexdigest()
            self._open.clear()

    def _hash(self, data: bytes) -> None:
        for state in self._open.values():
            state.update(data)


def _chunks(stream: Any) -> Iterator[bytes]:
    """The stream a few megabytes at a time; what was read before damage is handed out first."""
    read = getattr(stream, "read1", stream.read)
    while chunk := read(_CHUNK):
        yield chunk
