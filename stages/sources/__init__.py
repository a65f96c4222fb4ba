"""Sources: which shards exist, and the pictures of one shard.

A source is a file of this room and a line in `SOURCES`; its shards take their ids from the content
they point at. Read `folder` first, and `reading.row_ranges` for why no row is ever taken twice.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from arrag_runtime.format.errors import BadInputError
from schemas.records import MAX_ROWS_PER_SHARD, Count
from schemas.settings.source import SourceSettings
from stages.sources.reading.source_kind import Source, SourceKind

SOURCES = {
    "sample": "stages.sources.sample",
    "folder": "stages.sources.folder",
    "webdataset": "stages.sources.webdataset",
    "cc12m": "stages.sources.cc12m",
    "datacomp": "stages.sources.datacomp",
    "journeydb": "stages.sources.journeydb",
    "parquet": "stages.sources.parquet",
    "tokens": "stages.sources.tokens",
}
"""The module of each source; it is imported when the source is asked for."""


def source_kind(name: str) -> SourceKind:
    """What the source's own file says of it. Raises BadInputError for an unknown name."""
    if name not in SOURCES:
        raise BadInputError(f"unknown source '{name}'; choose one of {', '.join(SOURCES)}")
    kind: SourceKind = import_module(SOURCES[name]).SOURCE
    return kind


def open_source(settings: SourceSettings) -> Source:
    """The source of located settings.

    Raises BadInputError for an unknown name, a missing input, or a shard size that the ids of its
    rows could not count.
    """
    kind = source_kind(settings.name)
    if not settings.input and not kind.bundled:
        raise BadInputError(f"--source {settings.name} needs --input PATH")
    if (settings.shard_size or 0) > MAX_ROWS_PER_SHARD:
        raise BadInputError(
            f"--shard-size {settings.shard_size} is outside 1..{MAX_ROWS_PER_SHARD}"
        )
    return kind.open(settings)


def locate_source(settings: SourceSettings) -> SourceSettings:
    """The settings as any worker can use them: called once, by the driver.

    Paths become absolute, hub data sets get the commit they stand for now, and lists that are
    published by address are fetched. Raises BadInputError for what cannot be had, for folders of
    another source's files, and for options that the source does not have.
    """
    own = source_kind(settings.name)
    kinds = {name: source_kind(name) for name in SOURCES}
    for option in dict.fromkeys(option for kind in kinds.values() for option in kind.options):
        if getattr(settings, option) and option not in own.options:
            names = ", ".join(name for name, kind in kinds.items() if option in kind.options)
            raise BadInputError(
                f"--{option.replace('_', '-')} is for --source {names}, not {settings.name}; leave"
                " it out"
            )
    located = replace(settings, input=own.locate(settings))
    _require_its_files(located, kinds)
    return located


def count_inputs(settings: SourceSettings) -> Count:
    """How many inputs a source has, for a plan: what would have to be fetched first is not.

    Raises BadInputError where nothing can be said without fetching.
    """
    known = source_kind(settings.name).unfetched(settings)
    return open_source(locate_source(settings)).count() if known is None else known


def _require_its_files(settings: SourceSettings, kinds: dict[str, SourceKind]) -> None:
    """Raise BadInputError for folders that hold another source's files and none of its own."""
    own = kinds[settings.name].reads
    folders = [path for path in map(Path, settings.input) if path.is_dir()]
    if not own or not folders or len(folders) < len(settings.input) or _has_any(folders, own):
        return
    for name, kind in kinds.items():
        for ending in kind.reads:
            if _has_any(folders, (ending,)):
                raise BadInputError(
                    f"no file for --source {settings.name} below"
                    f" {', '.join(map(str, folders))}; looked for {', '.join(own)}; there are"
                    f" {ending} files, which --source {name} reads"
                )


def _has_any(folders: list[Path], endings: tuple[str, ...]) -> bool:
    return any(path.name.lower().endswith(endings) for f in folders for path in f.rglob("*"))
