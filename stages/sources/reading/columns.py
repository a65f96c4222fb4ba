"""Columns to records: which column of a table says what, by preset, by option or by its name.

In: a row as a dict and the mapping. Out: an `ImageRecord` where the row holds the picture, a
`LinkRecord` where it holds its address, a `GridRecord` where it holds its tokens, or a `Reject`.
A column path goes into structs and lists: `conversations.1.value`. Columns without a part are kept
as metadata.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from arrag_runtime.format.errors import BadInputError
from schemas.records import Box, GridRecord, GridShape, ImageRecord, LinkRecord, Reject
from stages.sources.reading.grids import grid_bytes
from stages.sources.reading.row_files import plain_columns

Record = ImageRecord | LinkRecord | GridRecord | Reject


@dataclass(frozen=True)
class ColumnMap:
    """The column path of each part of a record, None where the table has none."""

    image: str | None = None
    """The picture: bytes, or a struct with a field `bytes`."""
    grid: str | None = None
    """The picture's tokens."""
    url: str | None = None
    """The picture's address."""
    caption: str | None = None
    """Its description."""
    key: str | None = None
    """What names the row for people."""
    licence: str | None = None
    """The licence of the picture."""
    sha256: str | None = None
    """The hash of the bytes behind the address, as the publisher lists it."""
    faces: str | None = None
    """The boxes to be blurred, as shares of the picture's sides."""

    def used(self) -> tuple[str, ...]:
        """The top-level columns that are parts of records."""
        paths = [getattr(self, field.name) for field in fields(self)]
        return tuple(dict.fromkeys(path.split(".")[0] for path in paths if path))


PRESETS = {
    "datacomp": ColumnMap(
        url="url", caption="text", key="uid", sha256="sha256", faces="face_bboxes"
    ),
    "llava-recap-cc12m": ColumnMap(image="image", caption="conversations.1.value", key="id"),
    "midjourney-v6": ColumnMap(image="image", caption="llava", key="id"),
    "cc12m": ColumnMap(url="image_url", caption="caption"),
}
"""Published tables by name; see docs of each publisher for what else they hold."""

USUAL_NAMES = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"),
    "grid": ("tokens", "indices", "grid", "codes", "token_ids"),
    "url": ("url", "image_url", "URL"),
    "caption": ("caption", "text", "TEXT", "prompt", "description"),
    "key": ("key", "uid", "id", "image_id", "file_name", "filename"),
    "licence": ("licence", "license"),
    "sha256": ("sha256",),
    "faces": ("face_bboxes",),
}


def column_map(option: str | None, schema: pa.Schema, *, grids: bool) -> ColumnMap:
    """The mapping for a table: a preset, "part=column,…" over the usual names, or those alone.

    grids: whether the rows are to hold token grids instead of pictures.
    Raises BadInputError for a part or column that does not exist, or where nothing is a picture.
    """
    chosen = PRESETS.get(option or "") or _mapped(option, schema, grids)
    for name in chosen.used():
        if name not in schema.names:
            raise BadInputError(
                f"--columns {option or ''} names the column '{name}', which the table does not"
                f" have; it has {', '.join(schema.names)}"
            )
    if not (chosen.grid if grids else chosen.image or chosen.url):
        what = "grid" if grids else "image or url"
        raise BadInputError(
            f"no column is the {what}; the table has {', '.join(schema.names)}: name it with"
            f" --columns {what.split(' ')[0]}=COLUMN, or give a preset: {', '.join(PRESETS)}"
        )
    return chosen


def _mapped(option: str | None, schema: pa.Schema, grids: bool) -> ColumnMap:
    """The pairs "part=column,…" over the usual names that the table has."""
    guessed = {
        part: next((name for name in names if name in schema.names), None)
        for part, names in USUAL_NAMES.items()
    }
    for pair in option.split(",") if option else ():
        part, sign, path = pair.partition("=")
        if not sign or part.strip() not in guessed:
            raise BadInputError(
                f"--columns '{pair}' is no PART=COLUMN; parts are {', '.join(guessed)}, presets"
                f" {', '.join(PRESETS)}"
            )
        guessed[part.strip()] = path.strip() or None
    return ColumnMap(**guessed | {"image" if grids else "grid": None})


def wanted_columns(chosen: ColumnMap, schema: pa.Schema) -> list[str]:
    """The columns to read: the parts, and what is kept as metadata; other bytes are left out."""
    used = chosen.used()
    return [*used, *(n for n in plain_columns(schema) if n not in used and n != "vectors")]


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table; text that is no UTF-8 has its wrong bytes replaced."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except UnicodeDecodeError:
        columns = [map(_decoded, column) for column in table.columns]
        return [
            dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)
        ]
    return rows


def _decoded(value: pa.Scalar) -> Any:
    """A cell's value; wrong bytes of a text are replaced, what holds such a text is null."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        text = isinstance(value, pa.StringScalar | pa.LargeStringScalar)
        return str(value.as_buffer(), "utf-8", "replace") if text else None


def to_record(
    row: int,
    fields_: Mapping[str, Any],
    chosen: ColumnMap,
    default_key: str,
    shape: GridShape | None,
) -> Record:
    """The record of one row; `row` is its place in the shard's list."""
    part = {field.name: _reach(fields_, getattr(chosen, field.name)) for field in fields(chosen)}
    key = text_of(part["key"]) or default_key
    url, caption, licence = (text_of(part[name]) for name in ("url", "caption", "licence"))
    rest = metadata_text({k: v for k, v in fields_.items() if k not in chosen.used()})
    if chosen.grid:
        if part["grid"] is None:
            return Reject(row, key, "read", "no-grid", "the grid's column is null", url)
        grid = grid_bytes(part["grid"], shape)
        if not isinstance(grid, bytes):
            return Reject(row, key, "read", grid.reason, grid.detail, url)
        return GridRecord(row, key, grid, caption, url, licence, rest)
    if chosen.image:
        data = part["image"]
        data = data.get("bytes") if isinstance(data, dict) else data
        if not isinstance(data, bytes):
            return Reject(row, key, "read", "no-image", "the picture's column is null", url)
        return ImageRecord(row, key, data, caption, url, licence, rest, boxes(part["faces"]))
    if url is None:
        return Reject(row, key, "read", "no-url", "the address is null or empty")
    sha256 = (text_of(part["sha256"]) or "").lower() or None
    faces = boxes(part["faces"])
    return LinkRecord(row, key, url, caption, licence, rest, faces, sha256)


def _reach(fields_: Mapping[str, Any], path: str | None) -> Any:
    """The value at a path, None where something on the way is missing."""
    value: Any = fields_
    for step in path.split(".") if path else ("",):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list | tuple) and step.isdigit():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            return None
    return value


def text_of(value: object) -> str | None:
    """A value as text without blanks around it; None where nothing is left."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return (str(value).strip() or None) if value is not None else None


def boxes(value: object) -> tuple[Box, ...]:
    """Faces as a publisher lists them; a box that is not four finite numbers is left out."""
    found: list[Box] = []
    for box in value if isinstance(value, list) else ():
        sides = box if isinstance(box, Sequence) else ()
        if len(sides) == 4 and all(isinstance(s, int | float) and math.isfinite(s) for s in sides):
            x0, y0, x1, y1 = map(float, sides)
            found.append((x0, y0, x1, y1))
    return tuple(found)


def metadata_text(rest: Mapping[str, Any]) -> str | None:
    """What else is said of a picture as a JSON object; None where that is nothing."""
    present = {name: _plain(value) for name, value in rest.items() if value is not None}
    return json.dumps(present, ensure_ascii=False, default=str) if present else None


def _plain(value: Any) -> Any:
    """The value without what JSON cannot write: infinite numbers become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
