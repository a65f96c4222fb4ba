"""The `tokens` source: token grids that users already have, so that no model has to run.

--input: LlamaGen's `.npy` files (one per picture; a folder of them), HDF5 files with a data set
`indices`, or Arrow and Parquet files with a grid column. The grids are taken for those of
`--tokenizer`, and each is checked against its grid and codebook. There are no latents in them that
could be trusted to be the tokenizer's own, so latent key space is refused by the build.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from schemas.records import (
    Count,
    GridRecord,
    GridShape,
    ImageRecord,
    Listing,
    RecordedShard,
    Reject,
    Shard,
)
from schemas.settings.source import SourceSettings
from stages.sources.folder import FolderSource
from stages.sources.reading.columns import Record
from stages.sources.reading.files import HUB, hub_inputs
from stages.sources.reading.fingerprint import require_input, require_shard_size
from stages.sources.reading.grids import Misfit, grid_bytes
from stages.sources.reading.row_files import TABLE_ENDINGS
from stages.sources.reading.rows import RowSource
from stages.sources.reading.source_kind import SourceKind

_NPY = (".npy",)
_GRIDS_PER_SHARD = 1000


class NpySource:
    """A folder of `.npy` files, each the tokens of one picture; a caption stands in `NAME.txt`."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._grid = settings.grid
        self._folder = FolderSource(
            replace(settings, shard_size=settings.shard_size or _GRIDS_PER_SHARD),
            _NPY,
            "token files",
        )

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """See `Source.listing`."""
        return self._folder.listing(recorded)

    def read(self, shard: Shard) -> Iterator[Record]:
        """See `Source.read`."""
        for item in self._folder.read(shard):
            yield _grid_record(item, self._grid) if isinstance(item, ImageRecord) else item

    def count(self) -> Count:
        """See `Source.count`."""
        return self._folder.count()


def _grid_record(item: ImageRecord, shape: GridShape | None) -> GridRecord | Reject:
    try:
        values = np.load(io.BytesIO(item.data), allow_pickle=False)
    # A damaged file makes numpy raise nearly anything; pickles, which could run code, are refused.
    except Exception as error:
        detail = f"no .npy array: {type(error).__name__}: {error}"
        return Reject(item.row, item.key, "read", "no-grid", detail, item.url)
    grid = grid_bytes(values, shape)
    if isinstance(grid, Misfit):
        return Reject(item.row, item.key, "read", grid.reason, grid.detail, item.url)
    return GridRecord(item.row, item.key, grid, item.caption, item.url, item.licence, item.metadata)


class TokensSource:
    """Token grids in files of one picture, or in tables: whichever the inputs hold.

    Raises BadInputError without --input, or for a shard size that cannot be.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        require_input(settings.name, settings.input)
        require_shard_size(settings.shard_size)
        self._settings = settings

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """See `Source.listing`."""
        return self._source.listing(recorded)

    def read(self, shard: Shard) -> Iterator[Record]:
        """See `Source.read`. What kind it is follows from the shard: workers look at no tree."""
        single = shard.members[0].lower().endswith(_NPY)
        return self._of_kind(single).read(shard)

    def count(self) -> Count:
        """See `Source.count`."""
        return self._source.count()

    @cached_property
    def _source(self) -> NpySource | RowSource:
        given = self._settings.input
        folders = [path for path in map(Path, given) if path.is_dir()]
        tables = any(
            next((p for p in folder.rglob("*") if p.suffix.lower() in TABLE_ENDINGS), None)
            for folder in folders
        )
        return self._of_kind(
            len(folders) == len(given) and not tables and not given[0].startswith(HUB)
        )

    def _of_kind(self, single: bool) -> NpySource | RowSource:
        return NpySource(self._settings) if single else RowSource(self._settings, grids=True)


SOURCE = SourceKind(
    open=TokensSource,
    locate=hub_inputs,
    options=("columns", "revision"),
    reads=(*_NPY, *TABLE_ENDINGS),
    grids=True,
)
