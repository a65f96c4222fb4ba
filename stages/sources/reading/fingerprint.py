"""Names made from content: fingerprints of files, ids of shards."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from schemas.records import Shard

_WINDOW, _WINDOWS = 8 * 1024, 16


def fingerprint(path: Path) -> str:
    """16 hex digits from a file's size and 16 windows of 8 KiB, its first and last among them.

    Files up to 128 KiB are read whole, so that pictures are known by their content; of larger
    ones a part is read, so that a collection is not read twice. A large uncompressed file or tar
    that was changed in place between two windows, keeping its size, passes as unchanged.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as stream:
        if size <= _WINDOW * _WINDOWS:
            digest.update(stream.read())
        else:
            for window in range(_WINDOWS):
                stream.seek((size - _WINDOW) * window // (_WINDOWS - 1))
                digest.update(stream.read(_WINDOW))
    return digest.hexdigest()


def make_shard(source: str, members: Iterable[str]) -> Shard:
    """A shard of these members, its id being a hash of them."""
    fixed = tuple(members)
    text = "\0".join((source, *fixed)).encode("utf-8", "surrogateescape")
    return Shard(source, hashlib.blake2b(text, digest_size=8).hexdigest(), fixed)
