"""Lines of large text files: counted, hashed and found again without holding the file.

In: a plain or gzip file. Out: for ranges of lines their byte offsets (in the unpacked file) and
hashes, in one pass; or the lines of a range, read from its first byte on. The end of a last line
is not hashed, so that a file that grew keeps the hashes of what it had.
"""

import gzip
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import merge
from itertools import count
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
_HEAD_BYTES = 1 << 20
_DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a damaged file raises."""


@dataclass(frozen=True)
class Line:
    """A line of a file without its end, or its beginning and what is wrong with it."""

    data: bytes
    fault: str | None = None


@dataclass
class Scan:
    """What one pass over a file found."""

    lines: int = 0
    """How many lines there are, up to where the pass ended."""
    offsets: dict[int, int] = field(default_factory=dict)
    """The byte of the unpacked file with which a line begins, by the line's number."""
    digests: dict[Span, str] = field(default_factory=dict)
    """The hash of a span of lines, 16 hex digits."""


def unpacked(file: SourceFile) -> Any:
    """The file's bytes, unpacked where it is packed, whatever its name says."""
    return gzip.GzipFile(fileobj=file.open()) if is_packed(file) else file.open()


def is_packed(file: SourceFile) -> bool:
    """Whether the file is gzip, so that offsets are not those of its bytes on disk."""
    with file.open() as stream:
        return bool(stream.read(2) == b"\x1f\x8b")


def head_of(file: SourceFile) -> tuple[list[Line], int, bool]:
    """The first megabyte of lines, the bytes of the file they took, and whether they are all."""
    lines, read = [], 0
    with closing(lines_from(file, 0)) as stream:
        for line in stream:
            lines.append(line)
            read += len(line.data) + 1
            if read > _HEAD_BYTES:
                return lines, _packed_size(file, read) if is_packed(file) else read, False
    return lines, file.size, True


def _packed_size(file: SourceFile, unpacked_bytes: int) -> int:
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
    damaged = False
    with closing(unpacked(file)) as stream:
        try:
            stream.seek(first[1])
            for chunk in _chunks(stream):
                if not scan.feed(chunk):
                    break
        except _DAMAGE as error:
            require_reached(file, error)
            damaged = True
    return scan.end(damaged=damaged)


class _Scanner:
    """The state of one pass; see `scan_lines`."""

    def __init__(
        self, size: int | None, spans: set[Span], first: tuple[int, int], stop: int | None
    ) -> None:
        self._size, self._spans, self._stop = size, spans, stop
        self._waiting = sorted(spans, reverse=True)
        edges = {edge for span in spans for edge in span} | ({stop} if stop is not None else set())
        self._marks = merge(sorted(edges), count(0, size) if size else ())
        self._number, self._at = first
        self._mark: int | None = None
        self._carry = b""
        self._open: dict[Span, Any] = {}
        self._scan = Scan()
        self._begin(*first)

    def feed(self, chunk: bytes) -> bool:
        """Take in the next bytes; False when `stop` was reached."""
        # The last byte waits: an end of line that closes a span is not hashed.
        data = self._carry + chunk
        ends = np.flatnonzero(np.frombuffer(data, np.uint8)[:-1] == 10)
        before, start = self._number, 0
        while self._mark is not None and self._mark - before <= len(ends):
            end = int(ends[self._mark - before - 1])
            self._hash(data[start:end])
            for span in [s for s in self._open if s[1] == self._mark]:
                self._scan.digests[span] = self._open.pop(span).hexdigest()
            start = end + 1
            if self._mark == self._stop:
                self._number, self._at, self._carry = self._mark, self._at + start, b""
                return False
            self._hash(b"\n")
            self._begin(self._mark, self._at + start)
        self._number = before + len(ends)
        self._hash(data[start:-1])
        self._at += len(data) - 1
        self._carry = data[-1:]
        return True

    def end(self, *, damaged: bool) -> Scan:
        """The result, with spans that end where the pass does."""
        partial = self._carry not in (b"", b"\n")
        if partial:
            self._hash(self._carry)
        self._number += (self._carry == b"\n") + (partial or damaged)
        self._scan.lines = self._number
        self._scan.offsets[self._number] = self._at + len(self._carry)
        for (start, stop), state in self._open.items():
            cut = (start, stop) in self._spans and stop > self._number
            if start < self._number and not cut:
                self._scan.digests[start, self._number] = state.hexdigest()
        return self._scan

    def _begin(self, number: int, offset: int) -> None:
        """Begin the spans and the window that start with this line."""
        self._number = number
        self._mark = next((mark for mark in self._marks if mark > number), None)
        self._scan.offsets[number] = offset
        if self._size and number % self._size == 0:
            self._open[number, number + self._size] = blake2b(digest_size=8)
        while self._waiting and self._waiting[-1][0] == number:
            self._open[self._waiting.pop()] = blake2b(digest_size=8)

    def _hash(self, data: bytes) -> None:
        for state in self._open.values():
            state.update(data)


def _chunks(stream: Any) -> Iterator[bytes]:
    """The stream a few megabytes at a time; what was read before damage is handed out first."""
    read = getattr(stream, "read1", stream.read)
    return iter(lambda: read(_CHUNK), b"")
