"""What flows between the steps: shards, pictures on their way in, and rejects."""

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import pyarrow as pa

from arrag_runtime.format.ids import ROW_BITS

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 of a rectangle, as shares (0..1) of the picture's width and height."""
MAX_ROWS_PER_SHARD = 1 << ROW_BITS
"""So many rows can a patch id tell apart in a shard."""


@dataclass(frozen=True)
class Shard:
    """A unit of work: an ordered list of inputs."""

    source: str
    id: str
    """16 hex digits made from what the members point at, so that adding files renames nothing."""
    members: tuple[str, ...]
    """What the ledger records: of a folder one per file, of a tar one per range of its samples."""


@dataclass(frozen=True)
class RecordedShard:
    """A shard that the ledger knows."""

    shard: Shard
    inputs: int | None = None
    """How many inputs it has; None while it is planned and not done."""


@dataclass(frozen=True)
class Attempt:
    """A shard to run."""

    shard: Shard
    number: int = 1
    """The first attempt takes all of the shard."""
    rows: tuple[int, ...] = ()
    """What a later attempt takes: rows that were rejected."""


@dataclass(frozen=True)
class ImageRecord:
    """One picture as it came, and what is known of it."""

    row: int
    """Its place in the shard's own list."""
    key: str
    """What the source calls it."""
    data: bytes
    """The file's bytes."""
    caption: str | None = None
    url: str | None = None
    licence: str | None = None
    metadata: str | None = None
    """A JSON object with whatever else the source says of it."""
    faces: tuple[Box, ...] = ()
    """Rectangles to be blurred before the picture is used."""


@dataclass(frozen=True)
class LinkRecord:
    """A picture that is still to be fetched; the download step makes it an `ImageRecord`."""

    row: int
    key: str
    url: str
    caption: str | None = None
    licence: str | None = None
    metadata: str | None = None
    faces: tuple[Box, ...] = ()
    sha256: str | None = None
    """That of the original bytes as the publisher lists it, None where it does not."""


@dataclass(frozen=True)
class GridRecord:
    """A picture that comes as its token grid, so that no model is needed."""

    row: int
    key: str
    grid: bytes
    """The tokens as uint16, little-endian, in raster order; they fit the tokenizer."""
    caption: str | None = None
    url: str | None = None
    licence: str | None = None
    metadata: str | None = None


@dataclass(frozen=True)
class Reject:
    """An input that did not become a row, and why."""

    row: int
    key: str
    stage: str
    """Where it failed: "read", "download" or "decode"."""
    reason: str
    """One of `REASONS`."""
    detail: str
    """For people: what exactly was wrong."""
    url: str | None = None


ShardInput = ImageRecord | GridRecord | Reject
"""What the encoder gets."""

REASONS = {
    "bad-url": "no plain http or https URL: another scheme, no host, a user name in it",
    "blocked-address": "the host is at a loopback, private or otherwise not public address",
    "dns": "the host's name could not be resolved in time",
    "refused": "no connection: refused, reset or unreachable",
    "timeout": "connection and answer took longer than a URL may",
    "tls": "the certificate or the handshake is not acceptable",
    "too-many-redirects": "redirected more often than allowed",
    "http-403": "the server does not give it to us (401, 403, 451)",
    "http-404": "the server does not have it (404), or not any more (410)",
    "http-429": "the server asks for fewer requests",
    "http-5xx": "the server failed",
    "http-other": "another status than success",
    "broken-response": "no valid HTTP answer, or it ended early",
    "too-large": "more bytes than allowed",
    "disallowed": "an X-Robots-Tag forbids the use",
    "sha-mismatch": "the bytes are not those that the publisher listed",
    "missing": "the file was listed but is gone",
    "unreadable": "the file exists but reading it failed",
    "broken-archive": "the archive or table is damaged from here on",
    "name-twice": "a sample holds two files of one extension",
    "no-image": "a sample without a picture",
    "removed": "its bytes or its address are on the database's list of removed pictures",
    "empty": "zero bytes",
    "not-an-image": "the bytes are no picture in a known format",
    "truncated": "the picture ends early or is damaged",
    "too-many-pixels": "more pixels than allowed, seen before decoding",
    "too-small": "the shorter side is below the minimum",
    "too-elongated": "so long and narrow that its resized form has too many pixels",
    "unsupported-mode": "a pixel format that has no agreed reading as RGB",
    "bad-line": "a line of a list that names no picture",
    "no-url": "a row without an address",
    "no-grid": "a row or file without a token grid",
    "grid-size": "a token grid of another size than the tokenizer's",
    "token-outside": "a token that the tokenizer's codebook does not have",
}
"""Every reason a reject can have, with its meaning."""


@dataclass(frozen=True)
class GridShape:
    """What a token grid must be like to fit a tokenizer; its size is in tokens."""

    height: int
    width: int
    vocabulary: int
    """Tokens are below this number."""


@dataclass(frozen=True)
class Count:
    """How many inputs a source has."""

    inputs: int
    exact: bool
    """Whether they were counted, not estimated."""
    note: str = ""
    """How they were estimated."""
    links: bool = False
    """Whether they are addresses that have to be fetched."""


@dataclass(frozen=True)
class Listing:
    """What a source has to offer beyond what is recorded: the shards to do."""

    shards: Sequence[Shard]
    notes: Sequence[str] = ()
    """What people should know of it."""


_TEXTS = ("key", "url", "caption", "licence", "metadata", "stage", "reason", "detail")
RECORDS_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("data", pa.large_binary()),
        ("grid", pa.binary()),
        ("faces", pa.list_(pa.list_(pa.float64(), 4))),
        *((name, pa.string()) for name in _TEXTS),
    ]
)
"""A shard's inputs on their way to the encoder: pictures (data set), grids and rejects."""


def pack_records(items: Iterable[ShardInput]) -> pa.Buffer:
    """A shard's inputs as one Arrow stream, written a few at a time.

    It lies in a nameless temporary file ($TMPDIR) that is gone when the buffer is, and is mapped:
    a shard of large pictures takes disk, and memory only where there is some to spare.
    """
    names = RECORDS_SCHEMA.names
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_stream(pa.PythonFile(file, "w"), RECORDS_SCHEMA) as writer:
            for few in _few(items):
                rows = [
                    {name: _storable(getattr(item, name, None)) for name in names} for item in few
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=RECORDS_SCHEMA))
        file.flush()
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _few(items: Iterable[ShardInput]) -> Iterator[list[ShardInput]]:
    """The items in groups of up to 16, a group ending where it reaches 16 MiB."""
    group: list[ShardInput] = []
    size = 0
    for item in items:
        group.append(item)
        size += len(item.data) if isinstance(item, ImageRecord) else 0
        if len(group) == 16 or size >= 16 << 20:
            yield group
            group, size = [], 0
    if group:
        yield group


def _storable(value: object) -> object:
    """Text with what is no Unicode (halves of surrogate pairs, old encodings) replaced by "?"."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def unpack_records(stream: pa.Buffer | bytes) -> Iterator[ShardInput]:
    """The inputs that `pack_records` packed; one picture's bytes are copied at a time."""
    with pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            for index in range(batch.num_rows):
                row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                row["faces"] = tuple(map(tuple, row["faces"] or ()))
                kind: type[ShardInput] = ImageRecord if row["grid"] is None else GridRecord
                kind = kind if row["reason"] is None else Reject
                yield kind(**{field.name: row[field.name] for field in fields(kind)})
