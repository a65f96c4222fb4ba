"""A source of links for tests: a text file, a line a picture, `URL<TAB>CAPTION<TAB>SHA256`.

Importing this module adds it to the sources; Ray's workers import it when they are handed
`LinkSettings`, which stands in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.records import Count, LinkRecord, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources import SOURCES
from stages.sources.reading.fingerprint import make_shard
from stages.sources.reading.source_kind import SourceKind


@dataclass(frozen=True)
class LinkSettings(SourceSettings):
    """As any source's settings; its class makes workers import this module."""


class LinkSource:
    """Members are the lines themselves, so a shard can be read when the file is gone."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._path = Path(settings.input[0])
        self._size = settings.shard_size or 100

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        known = {r.shard.id: r for r in recorded}
        lines = self._path.read_text().splitlines()
        groups = [lines[start : start + self._size] for start in range(0, len(lines), self._size)]
        shards = [make_shard(self.name, group) for group in groups]
        return Listing([s for s in shards if s.id not in known or known[s.id].inputs is None])

    def count(self) -> Count:
        return Count(len(self._path.read_text().splitlines()), exact=True, links=True)

    def read(self, shard: Shard) -> Iterator[LinkRecord | Reject]:
        for row, line in enumerate(shard.members):
            url, caption, sha256, *_ = (*line.split("\t"), "", "")
            if not url:
                yield Reject(row, f"line{row}", "read", "missing", "the line has no URL")
            else:
                yield LinkRecord(row, f"line{row}", url, caption or None, sha256=sha256 or None)


SOURCE = SourceKind(open=LinkSource)
SOURCES["links"] = __name__


def link_settings(path: Path, shard_size: int = 100) -> LinkSettings:
    """Settings of the source of this file."""
    return LinkSettings(name="links", input=(str(path),), shard_size=shard_size)
