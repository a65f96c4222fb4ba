"""Sources: which shards exist, and the pictures of one shard.

A source is named in `SOURCES` and follows the protocol `Source`. Its shards take their ids from
the content they point at; what the ledger has recorded is never listed again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from schemas.errors import BadInputError
from schemas.records import (
    ImageRecord,
    LinkRecord,
    Listing,
    RecordedShard,
    Reject,
    Shard,
    SourceSettings,
)
from stages.sources.folder import FolderSource
from stages.sources.sample import sample_source
from stages.sources.webdataset import WebdatasetSource


class Source(Protocol):
    """What the pipeline needs of a source."""

    name: str

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """The shards to do: those planned before and found here, then new ones, in order.

        recorded: the ledger's shards of this source. Raises BadInputError for an input that
        is not there.
        """

    def read(self, shard: Shard) -> Iterator[ImageRecord | LinkRecord | Reject]:
        """The shard's inputs in order, each as a record, link or reject; rows count from 0."""


SOURCES: dict[str, Callable[[SourceSettings], Source]] = {
    "sample": sample_source,
    "folder": FolderSource,
    "webdataset": WebdatasetSource,
}


def open_source(settings: SourceSettings) -> Source:
    """The source of these settings. Raises BadInputError for an unknown name."""
    if settings.name not in SOURCES:
        raise BadInputError(f"unknown source '{settings.name}'; choose one of {', '.join(SOURCES)}")
    return SOURCES[settings.name](settings)
