"""The list of removed pictures as a file, exported and imported: csv, jsonl or parquet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import Layout
from schemas.tables import REMOVED_SCHEMA

_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class RemovedEntry:
    """A row of such a file: an input to suppress, and to hide where the database has it."""

    sha256: str | None = None
    """The sha256 of its original bytes, in hexadecimal."""
    url: str | None = None
    """Its address."""
    key: str | None = None
    """The name it had in its source."""
    source: str | None = None
    """The source it came from."""
    why: str | None = None
    """The reason; by default that of the removal which imports it."""


def export_removed(layout: Layout, path: Path) -> int:
    """Write the whole list to a file, by its suffix; returns how many rows it has."""
    _require_suffix(path, "--export")
    table = REMOVED_SCHEMA.empty_table()
    if exists(layout.removed):
        table = lance.dataset(layout.removed).to_table()
    when = table["when"].cast(pa.string())
    rows = table.set_column(table.schema.get_field_index("when"), "when", when)
    if path.suffix == ".csv":
        pa_csv.write_csv(rows, path)
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with path.open("w", encoding="utf-8") as file:
            for batch in rows.to_batches():
                file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    return int(table.num_rows)


def import_removed(path: Path) -> tuple[RemovedEntry, ...]:
    """The entries of a file that `export_removed`, or a person, wrote.

    It needs a column sha256 or url. Raises BadInputError for a file that cannot be used.
    """
    _require_suffix(path, "--import")
    try:
        rows = _read(path)
    except (OSError, TypeError, ValueError, pa.ArrowException) as error:
        line = str(error).splitlines()[0]
        raise BadInputError(f"cannot read --import '{path}': {line}") from error
    columns = {name for row in rows for name in row}
    if rows and not columns & {"sha256", "url"}:
        raise BadInputError(
            f"--import '{path}' has columns {', '.join(sorted(columns))}, but neither sha256 nor url"
        )
    return tuple(_entry(row, path) for row in rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [dict(json.loads(line)) for line in lines if line.strip()]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    else:
        # All columns as text: a key that looks like a number is none.
        named = pa_csv.open_csv(path).schema.names
        types = dict.fromkeys(named, pa.string())
        options = pa_csv.ConvertOptions(
            column_types=types, strings_can_be_null=True, null_values=[""]
        )
        table = pa_csv.read_csv(path, convert_options=options)
    return list(table.to_pylist())


def _entry(row: dict[str, Any], path: Path) -> RemovedEntry:
    names = ("sha256", "url", "key", "source", "why")
    values = {name: str(row[name]) for name in names if row.get(name)}
    if "sha256" in values:
        values["sha256"] = require_hash(values["sha256"], f"--import '{path}'")
    return RemovedEntry(**values)


def require_hash(text: str, where: str) -> str:
    """A sha256 in lower case. Raises BadInputError for what is none."""
    hex_digits = text.strip().lower()
    if len(hex_digits) != 64 or set(hex_digits) - set("0123456789abcdef"):
        raise BadInputError(f"{where}: '{text}' is no sha256; it has 64 hex digits")
    return hex_digits


def _require_suffix(path: Path, option: str) -> None:
    if path.suffix not in _SUFFIXES:
        raise BadInputError(
            f"{option} '{path}' has no known ending; name it with one of {', '.join(_SUFFIXES)}"
        )
