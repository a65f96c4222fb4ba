"""Names made from content: fingerprints of files, ids of shards."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from schemas.errors import BadInputError
from schemas.records import Shard

WINDOW = 16 * 1024


def fingerprint(path: Path) -> str:
    """16 hex digits from a file's size, its first and its last 16 KiB.

    Enough to tell pictures and tars apart without reading a collection twice: compressed
    files that differ anywhere differ at their ends or in size for all practical purposes.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as stream:
        digest.update(stream.read(WINDOW))
        if size > WINDOW:
            stream.seek(max(WINDOW, size - WINDOW))
            digest.update(stream.read(WINDOW))
    return digest.hexdigest()


def make_shard(source: str, members: Iterable[str]) -> Shard:
    """A shard of these members, its id being a hash of them."""
    fixed = tuple(members)
    digest = hashlib.blake2b(source.encode(), digest_size=8)
    for member in fixed:
        digest.update(b"\0" + member.encode("utf-8", "surrogateescape"))
    return Shard(source, digest.hexdigest(), fixed)


def require_input(name: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The --input of a source that needs one. Raises BadInputError where it is missing."""
    if not given:
        raise BadInputError(f"--source {name} needs --input PATH")
    return given
