"""What a folder's metadata file says of its pictures.

In: a folder with `metadata.csv`, `.jsonl` or `.parquet`. Out: its rows by file name.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from arrag_runtime.format.errors import BadInputError

_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")


def read_metadata(root: Path) -> Mapping[str, dict[str, Any]]:
    """The rows of a folder's metadata file by file name; empty where there is none."""
    paths = (root / name for name in _METADATA_FILES)
    path = next((path for path in paths if path.exists()), None)
    return _read_metadata(path, path.stat().st_mtime_ns) if path else {}


@lru_cache(maxsize=4)
def _read_metadata(path: Path, _changed: int) -> Mapping[str, dict[str, Any]]:
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            rows = table.to_dict(orient="records")
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [dict(json.loads(line)) for line in lines if line.strip()]
        else:
            rows = pq.read_table(path).to_pylist()
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInputError(f"cannot read {path}: {reason}; mend it or move it away") from error
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    column = next((name for name in _FILE_COLUMNS if name in columns), None)
    if rows and column is None:
        raise BadInputError(
            f"{path} has columns {', '.join(columns)}, but none of {', '.join(_FILE_COLUMNS)};"
            " name the file column file_name"
        )
    return {
        os.path.normpath(str(row.pop(column))): {str(k): v for k, v in row.items() if v is not None}
        for row in rows
        if column in row
    }


def take_text(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    """Remove and return the first of these fields that holds something, as text."""
    for name in names:
        if name in fields and str(fields[name]).strip():
            return str(fields.pop(name)).strip()
    return None


def with_numbers(table: pa.Table) -> pa.Table:
    """The table with columns of text that are all numbers, as a CSV file has them, as numbers."""
    for index, name in enumerate(table.column_names):
        if pa.types.is_string(table.schema.field(name).type):
            with contextlib.suppress(ValueError):
                numbers = [float(v) if v else None for v in table[name].to_pylist()]
                table = table.set_column(index, name, pa.array(numbers, pa.float64()))
    return table
