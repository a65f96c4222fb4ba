"""The `tokens` source: token grids that users already have, so that no model has to run.

--input: LlamaGen's `.npy` files (one per picture, its caption in `NAME.txt`; a folder of them), HDF5 files with a data set
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

from schemas.records import Count, GridRecord, ImageRecord, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources.folder import FolderSource
from stages.sources.reading.columns import Record
from stages.sources.reading.files import hub_inputs
from stages.sources.reading.grids import Misfit, grid_bytes
from stages.sources.reading.row_files import TABLE_ENDINGS
from stages.sources.reading.rows import RowSource
from stages.sources.reading.source_kind import SourceKind

_NPY = ".npy"
_GRIDS_PER_SHARD = 1000


class TokensSource:
    """A `Source` of grids in files of one picture, or in tables: whichever the inputs hold."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._settings = settings

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        return self._source.listing(recorded)

    def read(self, shard: Shard) -> Iterator[Record]:
        """What kind it is follows from the shard: workers look at no tree."""
        if not shard.members[0].lower().endswith(_NPY):
            yield from self._tables().read(shard)
            return
        for item in self._files().read(shard):
            yield self._grid_of(item) if isinstance(item, ImageRecord) else item

    def count(self) -> Count:
        return self._source.count()

    @cached_property
    def _source(self) -> FolderSource | RowSource:
        folders = [path for path in map(Path, self._settings.input) if path.is_dir()]
        below = (path for folder in folders for path in folder.rglob("*"))
        tables = any(path.suffix.lower() in TABLE_ENDINGS for path in below)
        single = len(folders) == len(self._settings.input) and not tables
        return self._files() if single else self._tables()

    def _files(self) -> FolderSource:
        size = self._settings.shard_size or _GRIDS_PER_SHARD
        return FolderSource(replace(self._settings, shard_size=size), (_NPY,), "token files")

    def _tables(self) -> RowSource:
        return RowSource(self._settings, grids=True)

    def _grid_of(self, item: ImageRecord) -> GridRecord | Reject:
        row, key, url = item.row, item.key, item.url
        try:
            values = np.load(io.BytesIO(item.data), allow_pickle=False)
        # Damaged files make numpy raise nearly anything; pickles, which could run code, are refused.
        except Exception as error:
            detail = f"no .npy array: {type(error).__name__}: {error}"
            return Reject(row, key, "read", "no-grid", detail, url)
        grid = grid_bytes(values, self._settings.grid)
        if isinstance(grid, Misfit):
            return Reject(row, key, "read", grid.reason, grid.detail, url)
        return GridRecord(row, key, grid, item.caption, url, item.licence, item.metadata)


SOURCE = SourceKind(
    open=TokensSource,
    locate=hub_inputs,
    options=("columns", "revision"),
    reads=(_NPY, *TABLE_ENDINGS),
    grids=True,
)
