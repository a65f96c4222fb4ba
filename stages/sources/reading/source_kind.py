"""What the pipeline needs of a source, and what a source's own file says of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.records import Count, Listing, RecordedShard, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.columns import Record
from stages.sources.reading.files import local_inputs


class Source(Protocol):
    """What the pipeline needs of a source."""

    name: str

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """The shards to do: those planned before and found here, then new ones, in order.

        recorded: the ledger's shards of this source. Raises BadInputError for an input that
        is not there.
        """

    def read(self, shard: Shard) -> Iterator[Record]:
        """The shard's inputs in order, each as a record or a reject; rows count from 0."""

    def count(self) -> Count:
        """How many inputs there are, for a plan: quick, and an estimate where it says so."""


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """A kind of source. The file of each one defines its own as `SOURCE`."""

    open: Callable[[SourceSettings], Source]
    """The source of located settings."""
    locate: Callable[[SourceSettings], tuple[str, ...]] = local_inputs
    """The inputs as any worker can use them, the source's own where none is given."""
    options: tuple[str, ...] = ()
    """Fields of `SourceSettings` that mean something to this kind and not to every other."""
    reads: tuple[str, ...] = ()
    """Endings of files that people may have given to another source by mistake."""
    grids: bool = False
    """Whether it gives token grids, so that no model runs."""
    bundled: bool = False
    """Whether its inputs come with the project, so that none are given."""
    gated: bool = False
    """Whether its publisher gives it to accounts that were granted access only."""
    unfetched: Callable[[SourceSettings], Count | None] = lambda _settings: None
    """What is known of inputs that a plan would have to fetch; None where there are none."""
