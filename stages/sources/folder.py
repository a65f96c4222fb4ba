"""The `folder` source: every picture below a folder, with optional captions.

A member is "FINGERPRINT RELATIVE/PATH": a moved folder keeps its shards, a file that changed is a
new input. Captions come from `NAME.txt` beside `NAME.jpg`, or from a `metadata.csv`, `.jsonl` or
`.parquet` at the top of the folder with a file-name column and a caption column; its columns
`url` and `licence` (or `license`) are taken too, and the others are kept as metadata.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress, islice
from pathlib import Path

import numpy as np

from arrag_runtime.format.errors import BadInputError
from schemas.records import Count, ImageRecord, Listing, RecordedShard, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.sources.reading.files import name_as_text
from stages.sources.reading.fingerprint import fingerprint, make_shard
from stages.sources.reading.folder_metadata import read_metadata, take_text, with_numbers
from stages.sources.reading.source_kind import SourceKind
from stages.sources.reading.where import parse_where, table_of

_PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
_LICENCE_COLUMNS = ("licence", "license")
_BESIDE = frozenset((".txt", ".json", ".jsonl", ".csv", ".parquet", ".md"))
"""What may stand beside pictures without a note about it."""
_UNREADABLE = "0" * 16
_FEWEST_FILES, _MOST_FILES, _FEWEST_SHARDS = 16, 1000, 8
_SHARD_BYTES = 256 << 20
"""A shard travels in memory, so large pictures make shards of fewer of them."""


class FolderSource:
    """A `Source` of pictures below folders; a shard takes an eighth of them, 16 to 1,000, unless told otherwise.

    suffixes: the endings of its files, in lower case. kind: what they are, for messages.
    """

    def __init__(
        self, settings: SourceSettings, suffixes: Sequence[str] = _PICTURES, kind: str = "pictures"
    ) -> None:
        self.name = settings.name
        self._suffixes, self._kind = suffixes, kind
        self._where = parse_where(settings.where) if settings.where is not None else None
        self._settings = settings
        self._roots = tuple(Path(path).expanduser() for path in settings.input)
        for root in self._roots:
            if not root.is_dir():
                what = "is a file" if root.exists() else "does not exist"
                raise BadInputError(
                    f"--input '{root}' {what}; --source {self.name} needs a folder of {kind}"
                )
        self._notes: list[str] = []

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        for root in self._roots:
            read_metadata(root)  # A file that is broken ends the listing, not every shard.
        here = self._members
        known = {member for r in recorded for member in r.shard.members}
        pending = [r.shard for r in recorded if r.inputs is None]
        reachable = [s for s in pending if any(m in here or self._find(m) for m in s.members)]
        # What could not be read when it was listed is known by its name alone.
        unread = {name for listed, name in map(_parts, known) if listed == _UNREADABLE}
        fresh = [m for m in here if m not in known and _parts(m)[1] not in unread]
        size = self._settings.shard_size or _shard_size(len(fresh))
        # A shard is of one root, so that a build that is given some of the roots finds theirs whole.
        by_root: dict[Path, list[str]] = {}
        for member in fresh:
            by_root.setdefault(here[member][0], []).append(member)
        groups = (group for own in by_root.values() for group in _cut(own, here, size))
        shards = [make_shard(self.name, group) for group in groups]
        notes = list(self._notes)
        seen = {member.split(" ")[0] for member in known}
        if again := sum(member.split(" ")[0] in seen for member in fresh):
            notes.append(f"{again} new files equal recorded ones of other names or paths")
        if lost := len(pending) - len(reachable):
            notes.append(f"{lost} shards planned earlier are not below this --input")
        return Listing(reachable + shards, notes)

    def read(self, shard: Shard) -> Iterator[ImageRecord | Reject]:
        for row, member in enumerate(shard.members):
            name = _parts(member)[1]
            try:
                if found := self._find(member):
                    yield self._record(row, name, *found)
                else:
                    detail = "gone or changed since it was listed"
                    yield Reject(row, name, "read", "missing", detail)
            except OSError as error:
                yield Reject(row, name, "read", "unreadable", str(error))

    def _record(self, row: int, name: str, root: Path, relative: str) -> ImageRecord:
        data = (root / relative).read_bytes()
        fields = dict(read_metadata(root).get(relative, {}))
        caption = take_text(fields, _CAPTION_COLUMNS)
        beside = (root / relative).with_suffix(".txt")
        if caption is None and beside.exists():
            caption = beside.read_text(encoding="utf-8", errors="replace").strip() or None
        url, licence = take_text(fields, ("url",)), take_text(fields, _LICENCE_COLUMNS)
        rest = json.dumps(fields, ensure_ascii=False, default=str) if fields else None
        return ImageRecord(row, name, data, caption, url, licence, rest)

    @cached_property
    def _members(self) -> dict[str, tuple[Path, int]]:
        """Every picture as member → root and bytes, in the order of their paths.

        The same relative path with the same content, below two roots, is one member.
        """
        wanted = list(islice(self._wanted(), self._settings.limit))
        self._require_some(len(wanted))
        members: dict[str, tuple[Path, int]] = {}
        for root, relative in wanted:
            content, size = _content(root / relative)
            members.setdefault(f"{content} {name_as_text(relative)}", (root, size))
        return members

    def _require_some(self, found: int) -> None:
        """Raise BadInputError where there is nothing to take."""
        if found or self._where is not None:
            return
        names, looked = ", ".join(map(str, self._roots)), ", ".join(sorted(self._suffixes))
        raise BadInputError(f"no {self._kind} below {names}; looked for {looked}")

    def _wanted(self) -> Iterable[tuple[Path, str]]:
        """Root and relative path of every file that --where takes, in the order asked for."""
        listed = ((root, name) for root in self._roots for name in self._pictures(root))
        seed = self._settings.shuffle_seed
        if self._where is None and seed is None:
            return listed
        chosen = list(listed)
        if self._where is not None:
            rows = [read_metadata(root).get(relative, {}) for root, relative in chosen]
            chosen = list(compress(chosen, self._where.strict_mask(with_numbers(table_of(rows)))))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(chosen))
            chosen = [chosen[index] for index in order]
        return chosen

    def count(self) -> Count:
        found = sum(1 for _ in self._wanted())
        self._require_some(found)
        return Count(min(found, self._settings.limit or found), exact=True)

    def _pictures(self, root: Path) -> Iterator[str]:
        """Relative paths of the pictures below `root`, sorted; hidden files are left out.

        Folders that cannot be entered, and what else lies there, become notes.
        """
        others: Counter[str] = Counter()

        def denied(error: OSError) -> None:
            self._notes.append(f"left out: {error.filename} ({error.strerror})")

        for folder, below, files in os.walk(root, onerror=denied):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(name for name in files if not name.startswith(".")):
                suffix = Path(name).suffix.lower()
                if suffix in self._suffixes:
                    yield str((Path(folder) / name).relative_to(root))
                elif suffix not in _BESIDE:
                    others[suffix or "no ending"] += 1
        if others:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
            self._notes.append(f"left out: {listed}")

    def _find(self, member: str) -> tuple[Path, str] | None:
        """The root and relative path of a member that has the fingerprint it was listed with."""
        listed, name = _parts(member)
        for root in self._roots:
            for relative in dict.fromkeys((name, _from_text(name))):
                path = root / relative
                if path.is_file() and listed in (fingerprint(path), _UNREADABLE):
                    return root, relative
        return None


def _content(path: Path) -> tuple[str, int]:
    """A file's fingerprint and bytes; one that cannot be read now is listed, and rejected later."""
    try:
        return fingerprint(path), path.stat().st_size
    except OSError:
        return _UNREADABLE, 0


def _parts(member: str) -> tuple[str, str]:
    """The fingerprint and the name of a member."""
    listed, _, name = member.partition(" ")
    return listed, name


def _cut(
    members: Sequence[str], found: Mapping[str, tuple[Path, int]], count: int
) -> Iterator[list[str]]:
    """Groups of up to `count` members and `_SHARD_BYTES`, in order."""
    group: list[str] = []
    held = 0
    for member in members:
        size = found[member][1]
        if group and (len(group) == count or held + size > _SHARD_BYTES):
            yield group
            group, held = [], 0
        group.append(member)
        held += size
    if group:
        yield group


def _from_text(name: str) -> str:
    """The file name that `name_as_text` wrote, its \\xNN being bytes again."""
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda m: os.fsdecode(bytes([int(m[1], 16)])), name)


def _shard_size(pictures: int) -> int:
    """At least eight shards where there are pictures enough, each a power of two up to 1,000."""
    wanted = 2 ** math.ceil(math.log2(max(pictures, 1) / _FEWEST_SHARDS))
    return int(min(max(wanted, _FEWEST_FILES), _MOST_FILES))


SOURCE = SourceKind(open=FolderSource, reads=_PICTURES)
