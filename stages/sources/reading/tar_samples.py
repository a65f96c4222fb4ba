"""The samples of a tar, plain or packed, as a stream.

In: an archive and how its names are to be read. Out: its samples in order; where it is damaged they
end with a `Damage`. Nothing is unpacked to disk, and one sample is held at a time.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from stages.sources.reading.files import SourceFile, require_reached

KeyOf = Callable[[tarfile.TarInfo], tuple[str | None, str]]
"""The sample a file belongs to and its extension; None for a file that is no part of one."""
_UNPACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"""How a tar may be packed, by the file's first bytes."""


@dataclass
class Sample:
    """The files of an archive that share one key: their bytes by their lower-case extensions."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    twice: str | None = None
    """An extension that came twice."""


@dataclass(frozen=True)
class Damage:
    """An archive cannot be read further, and why."""

    detail: str


def read_samples(archive: SourceFile, key_of: KeyOf) -> Generator[Sample | Damage, None, None]:
    """The samples of an archive in order: neighbouring files of one key.

    Where the archive is damaged they end with a `Damage`; a sample that it falls into is lost.
    """
    sample: Sample | None = None
    try:
        with archive.open() as file, open_tar(file) as tar:
            for member in tar:
                key, extension = key_of(member)
                if key is None:
                    continue
                if sample is not None and key != sample.key:
                    yield sample
                    sample = None
                partial, sample = sample or Sample(key), None
                suffix, stream = extension.lower(), tar.extractfile(member)
                if suffix in partial.files:
                    partial.twice = suffix
                partial.files[suffix] = stream.read() if stream else b""
                sample = partial
        damage = "ends without the mark of a tar's end" if _ends_early(archive) else None
    # A damaged tar makes tarfile raise nearly anything: what comes after is lost, not the shard.
    except Exception as error:
        require_reached(archive, error)
        damage = f"{type(error).__name__}: {error}"
    if sample is not None:
        yield sample
    if damage is not None:
        yield Damage(damage)


def open_tar(file: Any) -> tarfile.TarFile:
    """A tar as a stream. Where a packed one is cut off, what came before is read, then it raises.

    tarfile's own unpacking takes the end of a packed file for the end of the archive.
    """
    start = file.read(6)
    file.seek(0)
    unpack = next((u for magic, u in _UNPACKERS.items() if start.startswith(magic)), None)
    stream: Any = file if unpack is None else _Careful(unpack(file))
    return tarfile.open(fileobj=stream, mode="r|")


class _Careful:
    """A packed stream that hands out all it could unpack before it reports the damage."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._damage: Exception | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only where the stream ends."""
        data = bytearray()
        try:
            while self._damage is None and (part := self._stream.read1(size - len(data))):
                data += part
        except Exception as error:
            self._damage = error
        if self._damage is not None and not data:
            raise self._damage
        return bytes(data)


def _ends_early(archive: SourceFile) -> bool:
    """Whether an uncompressed tar lacks the zero blocks at its end, as one that was cut off does."""
    with archive.open() as stream:
        if stream.read(6).startswith(tuple(_UNPACKERS)):
            return False
        size = stream.seek(0, 2)
        stream.seek(max(0, size - tarfile.BLOCKSIZE))
        return size % tarfile.BLOCKSIZE != 0 or any(stream.read())


def count_samples(archive: SourceFile, key_of: KeyOf, *, stop: int = 1 << 62) -> int:
    """The number of samples in an archive, read off its headers, counting no further than `stop`.

    The damage of a damaged one counts as one more input, as it does when reading.
    """
    count = 0
    try:
        with archive.open() as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            keys = (key_of(member)[0] for member in tar)
            for _ in islice(groupby(key for key in keys if key is not None), stop):
                count += 1
    except Exception as error:
        require_reached(archive, error)
        return count + 1
    return count if count == stop else count + _ends_early(archive)
