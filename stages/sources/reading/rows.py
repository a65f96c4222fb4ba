"""Sources whose inputs are rows of tables: `parquet`, `datacomp`, and `tokens` in tables.

--input: Parquet, Arrow or HDF5 files, glob patterns, folders, or a data set on the hub. Rows are
counted in the files' footers, so a listing reads no row unless `--limit` meets `--where`. A shard is
a `Piece` of one file; its rows are read where the shard runs. A file whose footer cannot be read is
one reject; where a file is damaged further on, what came before is kept and the rest is one reject.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from arrag_runtime.format.errors import BadInputError
from schemas.records import Count, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.columns import Record, column_map, to_record, to_rows, wanted_columns
from stages.sources.reading.files import SourceFile, find_file, find_files
from stages.sources.reading.fingerprint import require_input, require_shard_size
from stages.sources.reading.row_files import (
    ENDINGS,
    PARQUET,
    DamagedFileError,
    RowFile,
    open_rows,
    split_columns,
)
from stages.sources.reading.row_ranges import Piece, Wanted, pending, remaining, windows
from stages.sources.reading.where import needed, parse_where, taken

LINKS_A_SHARD = 10_000
SHARD_BYTES = 256 << 20
"""A shard with pictures in it travels in memory; this is about what it may weigh."""
SMALLEST_SHARD, LARGEST_SHARD = 16, 2000
DATACOMP_SCALES = ("small", "medium", "large", "xlarge")
SAMPLED_FILES, FOOTERS_AT_ONCE = 4, 16


@dataclass(frozen=True)
class _Measured:
    """A file, its rows, and how many of them a shard takes; a damaged file counts as one row."""

    file: SourceFile
    rows: int
    shard_size: int
    links: bool = False
    damaged: bool = False


class RowSource:
    """See the module. `grids`: whether the rows hold token grids instead of pictures."""

    def __init__(self, settings: SourceSettings, *, grids: bool = False) -> None:
        self.name = settings.name
        self._settings = settings
        self._inputs = require_input(self.name, settings.input)
        self._grids = grids
        require_shard_size(settings.shard_size)
        self._where = parse_where(settings.where).text if settings.where is not None else None
        self._endings = ENDINGS if grids else PARQUET
        self._measured: list[_Measured] = []
        self._notes: list[str] = []

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """See `Source.listing`."""
        measured, notes = self._measure(), list(self._notes)
        seed, limit = self._settings.shuffle_seed, self._settings.limit
        wanted = windows(
            [(m.file.print, m.rows, m.file.name, m.shard_size) for m in measured], seed
        )
        if limit is not None:
            wanted = list(self._first(wanted, limit))
        reachable, lost = pending(recorded, [m.file.print for m in measured])
        if lost:
            notes.append(f"{lost} shards planned earlier are not in this --input")
        # A file that cannot be read is a reject whatever the conditions are.
        damaged = {m.file.print for m in measured if m.damaged}
        pieces = [
            *remaining([w for w in wanted if w.print not in damaged], recorded, self._where, seed),
            *remaining([w for w in wanted if w.print in damaged], recorded, None, None),
        ]
        return Listing(reachable + [piece.shard(self.name) for piece in pieces], notes)

    def read(self, shard: Shard) -> Iterator[Record]:
        """See `Source.read`."""
        piece = Piece.of(shard)
        file = self._file(piece)
        row = 0
        try:
            rows = open_rows(file)
            chosen = column_map(self._columns(), rows.schema, grids=self._grids)
            if self._settings.keep_faces:
                chosen = replace(chosen, faces=None)
            columns = wanted_columns(chosen, rows.schema)
            for number, fields in self._taken(rows, piece, columns):
                key = f"{piece.name}/{number}"
                yield to_record(row, fields, chosen, key, self._settings.grid)
                row += 1
        except DamagedFileError as error:
            yield Reject(row, piece.name, "read", "broken-archive", str(error))

    def count(self) -> Count:
        """See `Source.count`. Rows are counted in the footers; conditions on a few files."""
        measured = self._measure()
        total = sum(m.rows for m in measured)
        exact, note = True, ""
        if self._where is not None:
            step = max(1, len(measured) // SAMPLED_FILES)
            seen = passed = 0
            for m in measured[::step][:SAMPLED_FILES]:
                rows = min(m.rows, LINKS_A_SHARD)
                piece = Piece(m.file.print, 0, rows, m.file.name, self._where)
                seen += rows
                passed += len(list(self._numbers(m.file, piece, rows)))
            exact, note = False, f"{passed:,} of {seen:,} rows looked at pass --where"
            total = round(total * passed / max(seen, 1))
        limit = self._settings.limit
        limited = total if limit is None else min(total, limit)
        return Count(limited, exact, note, links=any(m.links for m in measured))

    def _columns(self) -> str | None:
        return self._settings.columns or ("datacomp" if self.name == "datacomp" else None)

    def _file(self, piece: Piece) -> SourceFile:
        file = find_file(self._inputs, self._endings, self.name, piece.name, piece.print)
        if file is None:
            raise BadInputError(
                f"the file {piece.name} of this shard is not in --input any more, or has changed;"
                " every node must see it at the same place"
            )
        return file

    def _measure(self) -> list[_Measured]:
        """Every file with its rows, read off its footer once."""
        if self._measured:
            return self._measured
        files = find_files(self._inputs, self._endings, self.name)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
            footers = list(threads.map(_footer, files))
        for file, footer in zip(files, footers, strict=True):
            if isinstance(footer, DamagedFileError):
                self._notes.append(f"{file.name} cannot be read and is one reject ({footer})")
                self._measured.append(_Measured(file, 1, 1, damaged=True))
                continue
            count, schema = footer
            chosen = column_map(self._columns(), schema, grids=self._grids)
            if self._where is not None:
                expression = parse_where(self._where)
                expression.require(split_columns(schema).plain)
                expression.mask(schema.empty_table())
            row_bytes = file.size / max(count, 1)
            size = self._shard_size(schema, row_bytes)
            links = chosen.image is None and chosen.grid is None
            self._measured.append(_Measured(file, count, size, links))
        return self._measured

    def _shard_size(self, schema: pa.Schema, row_bytes: float) -> int:
        if self._settings.shard_size:
            return self._settings.shard_size
        if not split_columns(schema).heavy:
            return LINKS_A_SHARD
        fits = int(SHARD_BYTES / max(row_bytes, 1))
        return min(max(fits, SMALLEST_SHARD), LARGEST_SHARD)

    def _first(self, wanted: list[Wanted], limit: int) -> Iterator[Wanted]:
        """The windows up to the `limit`th row that is taken, the last one cut after it."""
        by_print = {m.file.print: m for m in self._measure()}
        for window in wanted:
            if limit <= 0:
                return
            rows = window.stop - window.start
            measured = by_print[window.print]
            if self._where is None or measured.damaged:
                yield replace(window, stop=window.start + min(rows, limit))
                limit -= rows
                continue
            piece = Piece(window.print, window.start, window.stop, window.name, self._where)
            numbers = list(self._numbers(measured.file, piece, limit))
            cut = numbers[-1] + 1 if len(numbers) == limit else window.stop
            yield replace(window, stop=cut)
            limit -= len(numbers)

    def _numbers(self, file: SourceFile, piece: Piece, most: int) -> Iterator[int]:
        """The numbers of the rows a piece takes, `most` of them, by the condition's columns alone."""
        try:
            rows = open_rows(file)
            at = piece.start
            for table in rows.tables(piece.start, piece.stop, needed(piece.where, piece.without)):
                for index in taken(table, piece.where, piece.without).nonzero()[0].tolist():
                    yield at + index
                    most -= 1
                    if most == 0:
                        return
                at += table.num_rows
        except DamagedFileError:
            return

    def _taken(
        self, rows: RowFile, piece: Piece, columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows a piece takes, with their numbers in the file, in the piece's order."""
        extra = [n for n in needed(piece.where, piece.without) if n not in columns]
        read = [*columns, *(name for name in extra if name in rows.schema.names)]
        found = self._in_order(rows, piece, read, columns)
        if piece.seed is None:
            yield from found
            return
        # A shuffled shard is held whole; its size is bounded as any shard's.
        held: list[tuple[int, dict[str, Any]]] = []
        damage: DamagedFileError | None = None
        try:
            held.extend(found)
        except DamagedFileError as error:
            damage = error
        for index in piece.order(len(held)):
            yield held[index]
        if damage is not None:
            raise damage

    def _in_order(
        self, rows: RowFile, piece: Piece, read: Sequence[str], columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        at = piece.start
        for table in rows.tables(piece.start, piece.stop, read):
            mask = taken(table, piece.where, piece.without)
            kept = table.select(list(columns)).filter(pa.array(mask))
            yield from zip((at + mask.nonzero()[0]).tolist(), to_rows(kept), strict=True)
            at += table.num_rows


def _footer(file: SourceFile) -> tuple[int, pa.Schema] | DamagedFileError:
    """A file's rows and columns; the file is not kept open."""
    try:
        rows = open_rows(file)
    except DamagedFileError as error:
        return error
    return rows.count, rows.schema


def datacomp_source(settings: SourceSettings) -> RowSource:
    """DataComp's metadata: from --input, else the publisher's at --scale."""
    if settings.scale is not None and settings.scale not in DATACOMP_SCALES:
        raise BadInputError(
            f"--scale '{settings.scale}' is not one of {', '.join(DATACOMP_SCALES)}"
        )
    return RowSource(settings)


def datacomp_default(settings: SourceSettings) -> str:
    """The publisher's data set of this scale on the hub."""
    return f"mlfoundations/datacomp_{settings.scale or 'small'}"
