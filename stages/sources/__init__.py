"""Sources: which shards exist, and the pictures of one shard.

A source is named in `SOURCES` and follows the protocol `Source`. Its shards take their ids from
the content they point at; what the ledger has recorded is never listed again. Which rows a build
takes, and why none is taken twice, is said in `stages.sources.reading.row_ranges`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from arrag_runtime.format.errors import BadInputError
from schemas.records import (
    Count,
    GridRecord,
    ImageRecord,
    LinkRecord,
    Listing,
    RecordedShard,
    Reject,
    Shard,
)
from schemas.settings.source import SourceSettings
from stages.sources.cc12m import PUBLISHED, Cc12mSource
from stages.sources.folder import FolderSource
from stages.sources.journeydb import HUB_INPUT, journeydb_source
from stages.sources.reading.files import locate
from stages.sources.reading.publisher import cache_folder, fetch_published
from stages.sources.reading.rows import RowSource, datacomp_default, datacomp_source
from stages.sources.sample import sample_source
from stages.sources.tokens import TokensSource
from stages.sources.webdataset import webdataset_source


class Source(Protocol):
    """What the pipeline needs of a source."""

    name: str

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """The shards to do: those planned before and found here, then new ones, in order.

        recorded: the ledger's shards of this source. Raises BadInputError for an input that
        is not there.
        """

    def read(self, shard: Shard) -> Iterator[ImageRecord | LinkRecord | GridRecord | Reject]:
        """The shard's inputs in order, each as a record or a reject; rows count from 0."""

    def count(self) -> Count:
        """How many inputs there are, for a plan: quick, and an estimate where it says so."""


SOURCES: dict[str, Callable[[SourceSettings], Source]] = {
    "sample": sample_source,
    "folder": FolderSource,
    "webdataset": webdataset_source,
    "cc12m": Cc12mSource,
    "datacomp": datacomp_source,
    "journeydb": journeydb_source,
    "parquet": RowSource,
    "tokens": TokensSource,
}
ON_HUB = frozenset(("datacomp", "journeydb", "parquet", "tokens"))
"""Sources whose --input may be a data set on the hub."""
GRID_SOURCES = frozenset(("tokens",))
"""Sources of token grids: no model runs for them."""
OPTIONS = {
    "columns": ("parquet", "datacomp", "tokens"),
    "caption": ("journeydb",),
    "scale": ("datacomp",),
    "revision": tuple(sorted(ON_HUB)),
    "keep_faces": ("datacomp", "parquet"),
}
"""Options that mean something to some sources only."""


def open_source(settings: SourceSettings) -> Source:
    """The source of located settings. Raises BadInputError for an unknown name."""
    _require_known(settings)
    return SOURCES[settings.name](settings)


def locate_source(settings: SourceSettings) -> SourceSettings:
    """The settings as any worker can use them: called once, by the driver.

    Paths become absolute, hub data sets get the commit they stand for now, and lists that are
    published by address are fetched. Raises BadInputError for what cannot be had, and for options
    that the source does not have.
    """
    _require_known(settings)
    for option, names in OPTIONS.items():
        if getattr(settings, option) and settings.name not in names:
            raise BadInputError(
                f"--{option.replace('_', '-')} is for --source {', '.join(names)}, not"
                f" {settings.name}; leave it out"
            )
    inputs = settings.input
    if settings.name == "cc12m":
        inputs = tuple(_fetched(given, settings.cache) for given in inputs or (PUBLISHED,))
    elif settings.name in ON_HUB:
        defaults = {"datacomp": datacomp_default(settings), "journeydb": HUB_INPUT}
        given_or_own = inputs or tuple(v for k, v in defaults.items() if k == settings.name)
        inputs = tuple(locate(given, settings.revision) for given in given_or_own)
    else:
        inputs = tuple(str(Path(given).expanduser().absolute()) for given in inputs)
    return replace(settings, input=inputs)


def _fetched(given: str, cache: str | None) -> str:
    """The path of a list that is a path or an address."""
    if given.startswith(("http://", "https://")):
        return str(fetch_published(given, cache_folder(cache)))
    return str(Path(given).expanduser().absolute())


def _require_known(settings: SourceSettings) -> None:
    if settings.name not in SOURCES:
        raise BadInputError(f"unknown source '{settings.name}'; choose one of {', '.join(SOURCES)}")
