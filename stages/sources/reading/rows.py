"""Sources whose inputs are rows of tables: of pictures, of their addresses, or of token grids.

--input: Parquet, Arrow or HDF5 files, glob patterns, folders, or a data set on the hub. Rows are
counted in the files' footers, so a listing reads no row unless `--limit` meets `--where`. A shard
is a `RowRange` of one file; its rows are read where the shard runs. A file whose footer cannot be
read is one reject; where a file is damaged further on, what came before is kept and the rest is one
reject.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from schemas.records import Count, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.columns import Record, column_map, to_record, to_rows, wanted_columns
from stages.sources.reading.files import SourceFile
from stages.sources.reading.row_files import (
    PARQUET,
    TABLE_ENDINGS,
    DamagedFileError,
    RowFile,
    open_rows,
    plain_columns,
)
from stages.sources.reading.row_ranges import RowRange, RowSelection, pending
from stages.sources.reading.where import needed, parse_where, taken

_LINKS_PER_SHARD = 10_000
_SHARD_BYTES = 256 << 20
"""A shard with pictures in it travels in memory; this is about what it may weigh."""
_FEWEST_ROWS, _MOST_ROWS = 16, 2000
_SAMPLED_FILES, _FOOTERS_AT_ONCE = 4, 16


@dataclass(frozen=True)
class _Measured:
    """A file, its rows, and how many of them a shard takes; a damaged file counts as one row."""

    file: SourceFile
    rows: int
    shard_size: int
    links: bool = False
    damage: str | None = None


class RowSource:
    """A `Source` of tables of pictures, of addresses or, with `grids`, of token grids."""

    def __init__(self, settings: SourceSettings, *, grids: bool = False) -> None:
        self.name = settings.name
        self._settings = settings
        self._grids = grids
        endings = TABLE_ENDINGS if grids else PARQUET
        self._selection = RowSelection(settings, settings.input, endings)

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        by_print = {m.file.print: m for m in self._measured}
        damaged = {print_: m for print_, m in by_print.items() if m.damage is not None}
        reachable, lost = pending(recorded, by_print)
        ranges = self._selection.missing(
            [(m.file.print, m.rows, m.file.name, m.shard_size) for m in by_print.values()],
            recorded,
            lambda rows: self._numbers(by_print[rows.print], rows),
            damaged,
        )
        notes = [
            f"{m.file.name} cannot be read and is one reject ({m.damage})" for m in damaged.values()
        ]
        return Listing(reachable + [r.shard(self.name) for r in ranges], notes + lost)

    def read(self, shard: Shard) -> Iterator[Record]:
        wanted = RowRange.of(shard)
        file = self._selection.file_of(wanted)
        row = 0
        try:
            rows = open_rows(file)
            chosen = column_map(self._settings.columns, rows.schema, grids=self._grids)
            if self._settings.keep_faces:
                chosen = replace(chosen, faces=None)
            found = _rows_of(rows, wanted, wanted_columns(chosen, rows.schema))
            for number, fields in wanted.in_order(found):
                key = f"{wanted.name}/{number}"
                yield to_record(row, fields, chosen, key, self._settings.grid)
                row += 1
        except DamagedFileError as error:
            yield Reject(row, wanted.name, "read", "broken-archive", str(error))

    def count(self) -> Count:
        """Rows are counted in the footers, those that pass a condition in a few files."""
        measured = self._measured
        total = sum(m.rows for m in measured)
        exact, note = True, ""
        if self._selection.where is not None:
            step = max(1, len(measured) // _SAMPLED_FILES)
            seen = passed = 0
            for m in measured[::step][:_SAMPLED_FILES]:
                rows = min(m.rows, _LINKS_PER_SHARD)
                looked_at = RowRange(m.file.print, 0, rows, m.file.name, self._selection.where)
                seen += rows
                passed += sum(1 for _ in _numbers_of(m.file, looked_at))
            exact, note = False, f"{passed:,} of {seen:,} rows looked at pass --where"
            total = round(total * passed / max(seen, 1))
        links = any(m.links for m in measured)
        return Count(self._selection.at_most(total), exact, note, links=links)

    @cached_property
    def _measured(self) -> list[_Measured]:
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
            return list(threads.map(self._measure, self._selection.files().values()))

    def _measure(self, file: SourceFile) -> _Measured:
        """A file's rows, read off its footer; the file is not kept open."""
        try:
            rows = open_rows(file)
        except DamagedFileError as error:
            return _Measured(file, 1, 1, damage=str(error))
        chosen = column_map(self._settings.columns, rows.schema, grids=self._grids)
        plain = plain_columns(rows.schema)
        if self._selection.where is not None:
            parse_where(self._selection.where).strict_mask(rows.schema.empty_table().select(plain))
        size = _LINKS_PER_SHARD
        if len(plain) < len(rows.schema.names):
            fits = int(_SHARD_BYTES / max(file.size / max(rows.count, 1), 1))
            size = min(max(fits, _FEWEST_ROWS), _MOST_ROWS)
        links = chosen.image is None and chosen.grid is None
        return _Measured(file, rows.count, self._settings.shard_size or size, links)

    def _numbers(self, measured: _Measured, rows: RowRange) -> Iterable[int]:
        if self._selection.where is None or measured.damage is not None:
            return range(rows.start, rows.stop)
        return _numbers_of(measured.file, rows)


def _numbers_of(file: SourceFile, wanted: RowRange) -> Iterator[int]:
    """The numbers of the rows that a range takes, by the condition's columns alone."""
    columns = needed(wanted.where, wanted.without)
    at = wanted.start
    with suppress(DamagedFileError):
        for table in open_rows(file).tables(wanted.start, wanted.stop, columns):
            yield from (at + taken(table, wanted.where, wanted.without).nonzero()[0]).tolist()
            at += table.num_rows


def _rows_of(
    rows: RowFile, wanted: RowRange, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows that a range takes with their numbers in the file, in the file's order."""
    names = dict.fromkeys((*columns, *needed(wanted.where, wanted.without)))
    read = [name for name in names if name in rows.schema.names]
    at = wanted.start
    for table in rows.tables(wanted.start, wanted.stop, read):
        mask = taken(table, wanted.where, wanted.without)
        kept = table.select(list(columns)).filter(pa.array(mask))
        yield from zip((at + mask.nonzero()[0]).tolist(), to_rows(kept), strict=True)
        at += table.num_rows
