"""Files of rows: Parquet, Arrow and HDF5 behind one way to count and read them.

In: a `SourceFile`. Out: the number of rows and the columns, read off the file's footer or headers
alone, and the rows of a range as small Arrow tables in order. Whatever is wrong with a file is
raised as `DamagedFileError`, with what was read before it already handed out; a disk or a network
that fails, as `UnreachableError`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arrag_runtime.format.errors import BadInputError
from stages.sources.reading.files import SourceFile, require_reached

PARQUET, _ARROW, _HDF5 = (".parquet",), (".arrow", ".feather"), (".h5", ".hdf5")
TABLE_ENDINGS = (*PARQUET, *_ARROW, *_HDF5)
_ROWS_AT_ONCE, _HEAVY_ROWS_AT_ONCE = 4096, 64
"""Rows per table; fewer where a column holds pictures."""


class DamagedFileError(Exception):
    """A file, or what comes next in it, cannot be read."""


class RowFile(Protocol):
    """An open file of rows."""

    count: int
    schema: pa.Schema

    def tables(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Rows start..stop in order, these columns, a few at a time. Raises DamagedFileError."""


def open_rows(file: SourceFile) -> RowFile:
    """The file, its header or footer read. Raises DamagedFileError."""
    ending = file.location.lower()
    try:
        if ending.endswith(_HDF5):
            return _Hdf5Rows(file)
        return _ArrowRows(file) if ending.endswith(_ARROW) else _ParquetRows(file)
    # Damaged files make these parsers raise nearly anything.
    except Exception as error:
        raise _damage(file, error) from error


class _ParquetRows:
    def __init__(self, file: SourceFile) -> None:
        self._source = file
        self._file = pq.ParquetFile(file.open(), pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.count = self._file.metadata.num_rows

    def tables(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        groups: list[int] = []
        first = at = 0
        for group in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if at < stop and at + rows > start:
                first = first if groups else at
                groups.append(group)
            at += rows
        few = _rows_at_once(self.schema, columns)
        batches = self._file.iter_batches(batch_size=few, row_groups=groups, columns=list(columns))
        return _cut(self._source, batches, first, start, stop)


class _ArrowRows:
    """Arrow's own file format, or its stream format as Hugging Face's data sets are cached."""

    def __init__(self, file: SourceFile) -> None:
        self._source = file
        stream = pa.PythonFile(file.open())
        try:
            reader = pa.ipc.open_file(stream)
            count = reader.num_record_batches
            self._open: Any = lambda: (reader.get_batch(index) for index in range(count))
        except pa.ArrowInvalid:
            stream.seek(0)
            reader = pa.ipc.open_stream(stream)
            self._open = lambda: pa.ipc.open_stream(pa.PythonFile(file.open()))
        self.schema = reader.schema
        self.count = sum(batch.num_rows for batch in self._open())

    def tables(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        few = _rows_at_once(self.schema, columns)
        small = (
            batch.select(list(columns)).slice(at, few)
            for batch in self._open()
            for at in range(0, batch.num_rows, few)
        )
        return _cut(self._source, small, 0, start, stop)


class _Hdf5Rows:
    """Data sets of one length, the first axis being the row; groups are not entered.

    The released AR-RAG layout has `indices` and `vectors`, the tokens and latents of its pictures;
    only columns that are asked for are read.
    """

    def __init__(self, file: SourceFile) -> None:
        try:
            import h5py
        except ImportError as error:
            raise BadInputError(
                "HDF5 files need h5py; install it with `pip install h5py`, or the extra `build`"
            ) from error
        self._source = file
        self._file = h5py.File(file.open(), "r")
        sets = {name: item for name, item in self._file.items() if isinstance(item, h5py.Dataset)}
        if not sets:
            raise DamagedFileError("the HDF5 file holds no data set at its top level")
        lengths = {name: item.shape[0] for name, item in sets.items() if item.shape}
        self.count = max(lengths.values(), default=0)
        self._sets = {name: item for name, item in sets.items() if lengths.get(name) == self.count}
        kinds = {}
        for name, item in self._sets.items():
            text = item.dtype.kind in "OSU"
            value = pa.string() if text else pa.from_numpy_dtype(item.dtype)
            kinds[name] = value if item.ndim == 1 else pa.list_(value)
        self.schema = pa.schema(kinds)

    def tables(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        for low in range(start, stop, _ROWS_AT_ONCE):
            high = min(low + _ROWS_AT_ONCE, stop)
            try:
                arrays = [self._array(name, self._sets[name][low:high]) for name in columns]
            except Exception as error:
                raise _damage(self._source, error) from error
            yield pa.table(arrays, names=list(columns))

    def _array(self, name: str, values: Any) -> pa.Array:
        kind = self.schema.field(name).type
        if values.dtype.kind in "OS":
            texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
            return pa.array(texts, pa.string())
        if values.ndim == 1:
            return pa.array(values, kind)
        flat = values.reshape(len(values), -1)
        offsets = np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.reshape(-1)))


def plain_columns(schema: pa.Schema) -> list[str]:
    """The columns that hold no pictures, and so may be conditions."""
    return [field.name for field in schema if not _is_bytes(field.type)]


def _rows_at_once(schema: pa.Schema, columns: Sequence[str]) -> int:
    heavy = any(_is_bytes(schema.field(name).type) for name in columns)
    return _HEAVY_ROWS_AT_ONCE if heavy else _ROWS_AT_ONCE


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_is_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _cut(
    file: SourceFile, batches: Iterator[pa.RecordBatch], at: int, start: int, stop: int
) -> Iterator[pa.Table]:
    """The rows start..stop of a file's batches, which begin with row `at`."""
    try:
        for batch in batches:
            low, high = max(start - at, 0), min(stop - at, batch.num_rows)
            if low < high:
                yield pa.Table.from_batches([batch.slice(low, high - low)])
            at += batch.num_rows
            if at >= stop:
                return
    except (OSError, pa.ArrowException) as error:
        raise _damage(file, error) from error


def _damage(file: SourceFile, error: Exception) -> DamagedFileError:
    """What an error says of the file. Raises those that say nothing of it."""
    require_reached(file, error)
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return DamagedFileError(f"{type(error).__name__}: {reason}")
