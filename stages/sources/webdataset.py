"""The `webdataset` source: tars of KEY.jpg + KEY.txt + KEY.json, as img2dataset writes them.

--input: tar paths, brace patterns (`{00000..00099}.tar`), glob patterns or folders of tars.
A member is "FINGERPRINT START STOP NAME": a range of a tar's samples, so a tar of more samples than
one shard holds becomes several shards, each listed once the one before it proved full. Of the
json, `caption`, `url`, `licence` and `unblurred_faces` are taken and the rest is kept as metadata.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from schemas.errors import BadInputError
from schemas.records import (
    MAX_ROWS_PER_SHARD,
    Box,
    ImageRecord,
    Listing,
    RecordedShard,
    Reject,
    Shard,
    SourceSettings,
)
from stages.sources.content import fingerprint, make_shard, require_input

BLOCK = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass
class _Sample:
    """The files of one key, by their lower-case extensions; `twice` names one that came twice."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    twice: str | None = None

    def add(self, extension: str, data: bytes) -> None:
        if extension in self.files:
            self.twice = extension
        self.files[extension] = data


@dataclass(frozen=True)
class _Damage:
    detail: str


class WebdatasetSource:
    """See the module."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._limit = settings.limit
        self._size = settings.shard_size or MAX_ROWS_PER_SHARD
        if not 0 < self._size <= MAX_ROWS_PER_SHARD:
            raise BadInputError(f"--shard-size {self._size} is outside 1..{MAX_ROWS_PER_SHARD}")
        self._paths = _expand(require_input(self.name, settings.input))
        self._by_content: dict[str, Path] = {}

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """See `Source.listing`."""
        tars = self._tars()
        covered: dict[str, int] = {}
        ended: set[str] = set()
        for known in recorded:
            print_, start, stop, _ = _parse(known.shard.members[0])
            covered[print_] = max(covered.get(print_, 0), stop)
            if known.inputs is not None and known.inputs < stop - start:
                ended.add(print_)
        pending = [r.shard for r in recorded if r.inputs is None]
        reachable = [s for s in pending if _parse(s.members[0])[0] in tars]
        waiting = {_parse(s.members[0])[0] for s in pending}
        shards = []
        left = self._limit
        for print_, path in tars.items():
            if left == 0:
                break
            start = covered.get(print_, 0)
            stop = start + self._size
            if left is not None:
                held = _count_samples(path, stop=left)
                stop, left = min(stop, held), left - held
            if print_ not in ended and print_ not in waiting and start < stop:
                shards.append(make_shard(self.name, [f"{print_} {start} {stop} {_name(path)}"]))
        notes = []
        if lost := len(pending) - len(reachable):
            notes.append(f"{lost} shards planned earlier are not in this --input")
        return Listing(reachable + shards, notes)

    def read(self, shard: Shard) -> Iterator[ImageRecord | Reject]:
        """See `Source.read`. A damaged tar gives what came before the damage, and one reject."""
        print_, start, stop, name = _parse(shard.members[0])
        path = next((p for p in self._paths if _name(p) == name and fingerprint(p) == print_), None)
        path = path or self._tars().get(print_)
        if path is None:
            raise BadInputError(f"the tar {name} of shard {shard.id} is not in --input any more")
        for index, sample in enumerate(islice(_samples(path), stop)):
            row = index - start
            if row >= 0 and isinstance(sample, _Damage):
                yield Reject(row, name, "read", "broken-archive", sample.detail)
            elif row >= 0 and isinstance(sample, _Sample):
                yield _record(row, sample)

    def _tars(self) -> dict[str, Path]:
        """Every tar by its fingerprint; copies of one appear once."""
        if not self._by_content:
            for path in self._paths:
                self._by_content.setdefault(fingerprint(path), path)
        return self._by_content


def _expand(inputs: Sequence[str]) -> list[Path]:
    """The tars that paths, brace patterns, glob patterns and folders name, in their order."""
    tars: list[Path] = []
    for given in inputs:
        for pattern in _expand_braces(given):
            path = Path(pattern)
            if path.is_dir():
                found = sorted(tar for tar in path.rglob("*.tar") if tar.is_file())
            elif any(mark in pattern for mark in "*?["):
                found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
            else:
                found = [path] if path.exists() else []
            if not found:
                raise BadInputError(
                    f"--input '{pattern}' names no tar; give tar files, a brace pattern such as"
                    " 'DIR/{00000..00009}.tar', or a folder of tars"
                )
            tars += found
    return tars


def _expand_braces(given: str) -> list[str]:
    try:
        return list(braceexpand(str(Path(given).expanduser())))
    except ValueError as error:
        raise BadInputError(
            f"--input '{given}' has a brace that is not closed; write 'DIR/{{00000..00009}}.tar'"
        ) from error


def _name(path: Path) -> str:
    """A tar's name as text that tables can hold."""
    return path.name.encode("utf-8", "replace").decode()


def _parse(member: str) -> tuple[str, int, int, str]:
    print_, start, stop, name = member.split(" ", 3)
    return print_, int(start), int(stop), name


def _samples(path: Path) -> Iterator["_Sample | _Damage"]:
    """The samples of a tar in order: neighbouring files whose names webdataset gives one key.

    Where the tar is damaged they end with a `_Damage`; a sample that it falls into is lost.
    """
    sample: _Sample | None = None
    whole = True
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                key, extension = _key(member)
                if key is None:
                    continue
                if sample is not None and key != sample.key:
                    yield sample
                    sample = None
                whole = False
                sample = sample or _Sample(key)
                stream = archive.extractfile(member)
                sample.add(extension.lower(), stream.read() if stream else b"")
                whole = True
        damage = "ends without the mark of a tar's end" if _ends_early(path) else None
    # A damaged tar makes tarfile raise nearly anything: what comes after is lost, not the shard.
    except Exception as error:
        damage = f"{type(error).__name__}: {error}"
    if sample is not None and whole:
        yield sample
    if damage is not None:
        yield _Damage(damage)


def _ends_early(path: Path) -> bool:
    """Whether an uncompressed tar lacks the zero blocks at its end, as one that was cut off does."""
    with path.open("rb") as stream:
        if stream.read(6).startswith(COMPRESSED):
            return False
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - BLOCK))
        return size % BLOCK != 0 or any(stream.read())


def _key(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """A file's key and extension as webdataset splits its name, at the first dot; None without one.

    webdataset's own function is one such expression, and importing it would import torch.
    """
    split = re.fullmatch(r"((?:.*/)?[^.]+)\.([^/]*)", member.name)
    return (split[1], split[2]) if split and member.isreg() else (None, "")


def _count_samples(path: Path, *, stop: int) -> int:
    """The number of samples in a tar, read off its headers, counting no further than `stop`."""
    count, last = 0, None
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                key = _key(member)[0]
                if key is not None and key != last:
                    last, count = key, count + 1
                    if count >= stop:
                        break
    except Exception:  # The damage counts as one more input, as it does when reading.
        return count + 1
    return count


def _record(row: int, sample: _Sample) -> ImageRecord | Reject:
    fields = _json_object(sample.files.get("json"))
    url = _text(fields.pop("url", None))
    if sample.twice is not None:
        detail = f"the sample holds two files .{sample.twice}"
        return Reject(row, sample.key, "read", "name-twice", detail, url)
    data = next((sample.files[s] for s in IMAGE_SUFFIXES if s in sample.files), None)
    if data is None:
        detail = f"the sample holds {', '.join(sample.files)}"
        return Reject(row, sample.key, "read", "no-image", detail, url)
    caption = _text(fields.pop("caption", None))
    if "txt" in sample.files:
        caption = _text(sample.files["txt"].decode("utf-8", errors="replace")) or caption
    licence = _text(fields.pop("licence", None)) or _text(fields.pop("license", None))
    faces = _boxes(fields.pop("unblurred_faces", None))
    rest = json.dumps(fields, ensure_ascii=False) if fields else None
    return ImageRecord(row, sample.key, data, caption, url, licence, rest, faces)


def _json_object(data: bytes | None) -> dict[str, Any]:
    """The sample's json; anything else than an object is kept as it is, under "json"."""
    if data is None:
        return {}
    text = data.decode("utf-8", errors="replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {"json": text}
    return fields if isinstance(fields, dict) else {"json": fields}


def _boxes(listed: Any) -> tuple[Box, ...]:
    """Faces that `stages.keep_images` wrote down, since the pictures it keeps show them."""
    try:
        return tuple(
            (float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in listed or ()
        )
    except (TypeError, ValueError):  # Another tool's column of this name.
        return ()


def _text(value: object) -> str | None:
    return (str(value).strip() or None) if value is not None else None
