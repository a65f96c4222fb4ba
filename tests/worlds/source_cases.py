"""Pictures on disk for every source, and reading all that a source offers."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.records import (
    GridRecord,
    GridShape,
    ImageRecord,
    LinkRecord,
    RecordedShard,
    Reject,
    Shard,
)
from schemas.settings.source import SourceSettings
from stages.sources import locate_source, open_source
from stages.sources.reading.source_kind import Source
from tests.conftest import jpeg

Item = ImageRecord | LinkRecord | GridRecord | Reject
Items = list[Item]
GRID = GridShape(4, 6, 64)
COUNT = 7


def folder_of(root: Path, count: int = COUNT) -> Path:
    """A folder of pictures, two folders deep, every other one with a caption beside it."""
    for number in range(count):
        path = root / ("deep/er" if number % 3 == 0 else ".") / f"p{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, 40, 36))
        if number % 2:
            path.with_suffix(".txt").write_text(f" caption {number} \n")
    return root


def tar_of(folder: Path, path: Path) -> Path:
    """The folder's files as a tar, the same bytes every time."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.add(file, str(file.relative_to(folder)), filter=_undated)
    return path


def _undated(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = 0
    return member


def tgz_of(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """A tar with gzip of these files in this order, the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = gzip.GzipFile(path, "wb", 1, mtime=0)
    with packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tsv_of(path: Path, count: int = COUNT, start: int = 0) -> Path:
    """A list as Conceptual 12M is published: no header, address, tab, caption."""
    numbers = range(start, start + count)
    lines = [f"https://host{n}.example/{n}.jpg\tcaption {n}\n" for n in numbers]
    path.write_text("".join(lines))
    return path


def parquet_of(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    """A Parquet file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = options.pop("schema", None)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, **options)
    return path


def datacomp_rows(count: int = COUNT) -> list[dict[str, Any]]:
    """Rows with DataComp's columns."""
    return [
        {
            "uid": f"{n:032x}",
            "url": f"https://host{n}.example/{n}.jpg",
            "text": f"caption {n}",
            "original_width": 300 + n,
            "original_height": 200,
            "clip_b32_similarity_score": 0.2 + n / 100,
            "clip_l14_similarity_score": 0.25 + n / 100,
            "face_bboxes": [[0.1, 0.1, 0.2, 0.3]] if n % 2 else [],
            "sha256": f"{n:064x}",
        }
        for n in range(count)
    ]


def journeydb_of(root: Path, counts: Sequence[int] = (4, 3)) -> Path:
    """JourneyDB's layout: NNN.tgz archives and a jsonl of annotations in a tgz of its own."""
    lines = []
    for number, count in enumerate(counts):
        names = [f"{number:03}/{n}-x.jpg" for n in range(count)]
        files = [(f"./{name}", jpeg(10 * number + n, 40, 36)) for n, name in enumerate(names)]
        tgz_of(root / "data/train/imgs" / f"{number:03}.tgz", files)
        for name in names:
            described = {"Caption": f"a picture {name}"}
            line = {"img_path": f"./{name}", "prompt": f"{name} --v 5", "Task2": described}
            lines.append(line | {"Task1": {"Style": ["oil"]}, "Task3": {"Style": ["Q?"]}})
    data = "".join(json.dumps(line) + "\n" for line in reversed(lines)).encode()
    name = "train_anno_realease_repath.jsonl"
    tgz_of(root / "data/train" / f"{name}.tgz", [(name, data)])
    return root


def grid_of(seed: int, shape: GridShape = GRID) -> Any:
    """Tokens int64 [h, w] of a grid that fits `shape`."""
    size = (shape.height, shape.width)
    return np.random.default_rng(seed).integers(0, shape.vocabulary, size)


def npy_of(root: Path, count: int = COUNT) -> Path:
    """A folder as LlamaGen extracts codes: an array [1, 1, h · w] a picture."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        np.save(root / f"{number}.npy", grid_of(number).reshape(1, 1, -1))
    return root


def parquet_rows(count: int = COUNT) -> list[dict[str, Any]]:
    """Rows with the columns of LLaVA-ReCap-CC12M."""
    return [
        {
            "image": {"bytes": jpeg(n, 40, 36), "path": f"{n}.jpg"},
            "conversations": [
                {"from": "human", "value": "Describe <image>"},
                {"from": "gpt", "value": f"caption {n}"},
            ],
            "id": f"id{n}",
            "data_source": "cc12m",
        }
        for n in range(count)
    ]


CASES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "sample": lambda _tmp: (),
    "folder": lambda tmp: (str(folder_of(tmp / "pictures")),),
    "webdataset": lambda tmp: (str(tar_of(folder_of(tmp / "pictures"), tmp / "a.tar")),),
    "cc12m": lambda tmp: (str(tsv_of(tmp / "cc12m.tsv")),),
    "datacomp": lambda tmp: (str(parquet_of(tmp / "meta" / "a.parquet", datacomp_rows())),),
    "journeydb": lambda tmp: (str(journeydb_of(tmp / "journeydb")),),
    "parquet": lambda tmp: (str(parquet_of(tmp / "a.parquet", parquet_rows())),),
    "tokens": lambda tmp: (str(npy_of(tmp / "codes")),),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "parquet": {"columns": "llava-recap-cc12m"},
    "tokens": {"grid": GRID},
}
"""What a source's case needs besides its input."""


def open_case(name: str, tmp: Path, **changes: Any) -> Source:
    """The source of this name over its case's pictures."""
    return open_at(name, *CASES[name](tmp), **OPTIONS.get(name, {}) | changes)


def open_at(name: str, *inputs: Path | str, **changes: Any) -> Source:
    """The source of this name over these inputs, located as the build does it."""
    return open_source(
        locate_source(SourceSettings(name=name, input=tuple(map(str, inputs)), **changes))
    )


def open_folder(*roots: Path, **changes: Any) -> Source:
    """A folder source over these roots."""
    return open_source(SourceSettings(name="folder", input=tuple(map(str, roots)), **changes))


def read_all(source: Source, recorded: tuple[RecordedShard, ...] = ()) -> dict[Shard, Items]:
    """Everything the source offers, listed until nothing is left."""
    found: dict[Shard, Items] = {}
    while fresh := [s for s in source.listing(recorded).shards if s not in found]:
        for shard in fresh:
            found[shard] = list(source.read(shard))
            recorded += (RecordedShard(shard, len(found[shard])),)
    return found


def items_of(source: Source) -> Items:
    """Everything the source offers, in order."""
    return [item for items in read_all(source).values() for item in items]


def records(source: Source) -> dict[str, ImageRecord]:
    """Every picture of the source by its key."""
    return {item.key: item for item in items_of(source) if isinstance(item, ImageRecord)}


def packable(items: Iterable[Item]) -> list[ImageRecord | GridRecord | Reject]:
    """What travels to the encoder: links have become pictures by then."""
    return [
        ImageRecord(item.row, item.key, b"fetched", item.caption, item.url, faces=item.faces)
        if isinstance(item, LinkRecord)
        else item
        for item in items
    ]


def rowless(item: Item) -> Item:
    """The item without its place in a shard, to compare it between shards."""
    return replace(item, row=0)
