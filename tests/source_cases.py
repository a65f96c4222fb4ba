"""Pictures on disk for every source, and reading all that a source offers."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from schemas.records import ImageRecord, LinkRecord, RecordedShard, Reject, Shard, SourceSettings
from stages.sources import Source, open_source
from tests.conftest import jpeg

Items = list[ImageRecord | Reject]


def folder_of(root: Path, count: int = 7) -> Path:
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


CASES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "sample": lambda _tmp: (),
    "folder": lambda tmp: (str(folder_of(tmp / "pictures")),),
    "webdataset": lambda tmp: (str(tar_of(folder_of(tmp / "pictures"), tmp / "a.tar")),),
}


def open_case(name: str, tmp: Path, **changes: Any) -> Source:
    """The source of this name over its case's pictures."""
    return open_source(SourceSettings(name, CASES[name](tmp), **changes))


def open_folder(*roots: Path, **changes: Any) -> Source:
    """A folder source over these roots."""
    return open_source(SourceSettings("folder", tuple(map(str, roots)), **changes))


def read_all(source: Source, recorded: tuple[RecordedShard, ...] = ()) -> dict[Shard, Items]:
    """Everything the source offers, listed until nothing is left."""
    found: dict[Shard, Items] = {}
    while fresh := [s for s in source.listing(recorded).shards if s not in found]:
        for shard in fresh:
            found[shard] = [i for i in source.read(shard) if not isinstance(i, LinkRecord)]
            recorded += (RecordedShard(shard, len(found[shard])),)
    return found


def records(source: Source) -> dict[str, ImageRecord]:
    """Every picture of the source by its key."""
    items = [item for items in read_all(source).values() for item in items]
    return {item.key: item for item in items if isinstance(item, ImageRecord)}
