"""The files of a source: local paths, glob patterns and folders, or a data set on the hub.

A hub data set is named `OWNER/NAME` or `hf://datasets/OWNER/NAME[@REVISION][/PATH]`; the revision
is resolved to its commit once, in the driver, so that all workers read the same files. A file is
known by its fingerprint, which a hub file takes from the hash the hub publishes: a local copy of a
hub file counts as another file. Local files must lie where every node of a cluster sees them.
"""

import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrag_runtime.format.errors import ArragError, BadInputError, ShardError
from schemas.settings.source import SourceSettings
from stages.sources.reading.fingerprint import fingerprint

HUB = "hf://"
_HUB_DATASETS = f"{HUB}datasets/"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BYTES_AT_ONCE = 4 << 20
"""Bytes asked of the hub at a time."""


@dataclass(frozen=True)
class SourceFile:
    """One file."""

    location: str
    """Where it is: a path, or a hub address."""
    name: str
    """Its name for people: relative to the folder or data set that was given."""
    size: int
    """Its bytes; 0 where they are not known."""
    print: str
    """Its fingerprint, 16 hex digits."""

    def open(self) -> Any:
        """A seekable binary stream of the file.

        Reading one on the hub raises UnreachableError where the network fails, and one on a disk
        an OSError with a number (see `require_reached`). Both say nothing about the file, so they
        must fail the shard rather than become a reject.
        """
        if self.location.startswith(HUB):
            return io.BufferedReader(_HubStream(self.location), _BYTES_AT_ONCE)
        return Path(self.location).open("rb")


class UnreachableError(ShardError):
    """A file could not be read now, for want of the disk or the network."""


def require_reached(file: SourceFile, error: Exception) -> None:
    """Raise what is no damage of the file: an error of ours, or UnreachableError for a disk's.

    What libraries raise for damaged contents has no number of the system's, also where it is an
    OSError.
    """
    if isinstance(error, ArragError):
        raise error
    if isinstance(error, OSError) and error.errno is not None:
        raise UnreachableError(f"cannot read {file.location} ({error.strerror})") from error


class _HubStream(io.RawIOBase):
    """A hub file, read by ranges."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self._location = location
        self._stream = self._try(lambda: _hub().open(location, "rb", block_size=_BYTES_AT_ONCE))

    def readinto(self, buffer: Any) -> int:
        data: bytes = self._try(lambda: self._stream.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._stream.seek(offset, whence))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _try(self, read: Callable[[], Any]) -> Any:
        # The hub's client raises errors of several libraries, all of which mean the same here.
        try:
            return read()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise UnreachableError(f"cannot read {self._location} ({reason})") from error


def locate(given: str, revision: str | None) -> str:
    """An --input as every worker can use it: an absolute path, or a hub address with its commit.

    Raises BadInputError for a hub data set that cannot be reached.
    """
    path = Path(given).expanduser()
    if _HUB_ID.fullmatch(given) and not path.exists():
        given = _HUB_DATASETS + given
    return _pin(given, revision) if given.startswith(HUB) else str(path.absolute())


def local_inputs(settings: SourceSettings) -> tuple[str, ...]:
    """The inputs as absolute paths or patterns."""
    return tuple(str(Path(given).expanduser().absolute()) for given in settings.input)


def hub_inputs(settings: SourceSettings, *default: str) -> tuple[str, ...]:
    """The inputs, or else `default`, each a path or a data set on the hub; see `locate`."""
    return tuple(locate(given, settings.revision) for given in settings.input or default)


def find_files(inputs: Sequence[str], endings: Sequence[str], source: str) -> list[SourceFile]:
    """The files with these endings below the located inputs, in order, copies of one once.

    Raises BadInputError for an input that names none.
    """
    found: dict[str, SourceFile] = {}
    for given in inputs:
        if given.startswith(HUB):
            listed = _on_hub(given, endings)
        else:
            listed = [_local_file(path, name) for path, name in _local_paths(given, endings)]
        if not listed:
            raise BadInputError(
                f"--input '{given}' names no {' or '.join(endings)} file; give files, a glob"
                f" pattern, a folder, or a hub data set OWNER/NAME to --source {source}"
            )
        for file in listed:
            found.setdefault(file.print, file)
    return list(found.values())


def find_file(
    inputs: Sequence[str], endings: Sequence[str], source: str, name: str, print_: str
) -> SourceFile | None:
    """The file with this fingerprint, looked for first among those of its name; None if gone."""
    for given in inputs:
        if not given.startswith(HUB):
            for path, its_name in _local_paths(given, endings):
                if its_name == name and (file := _local_file(path, its_name)).print == print_:
                    return file
    everything = find_files(inputs, endings, source)
    return next((file for file in everything if file.print == print_), None)


def _local_paths(given: str, endings: Sequence[str]) -> list[tuple[Path, str]]:
    """Paths and names below an input; a name is relative to a folder that was given."""
    path = Path(given)
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if _fits(p.name, endings) and p.is_file())
        return [(p, name_as_text(str(p.relative_to(path)))) for p in paths]
    matching = sorted(glob.glob(given, recursive=True))  # noqa: PTH207
    paths = [path] if path.exists() else [p for p in map(Path, matching) if p.is_file()]
    return [(p, name_as_text(p.name)) for p in paths]


def name_as_text(name: str) -> str:
    """A file name as text that tables can hold: bytes that are no UTF-8 are written \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _local_file(path: Path, name: str) -> SourceFile:
    try:
        return SourceFile(str(path), name, path.stat().st_size, fingerprint(path))
    except OSError:
        # Without content to be known by, the file is known by its name; reading it gives a reject.
        return SourceFile(str(path), name, 0, _digest(f"unreadable {name}"))


def _fits(name: str, endings: Sequence[str]) -> bool:
    return name.lower().endswith(tuple(endings)) and not name.startswith(".")


def _hub() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def _pin(address: str, revision: str | None) -> str:
    """The address with the commit its revision (default: main) stands for now."""
    if not address.startswith(_HUB_DATASETS):
        raise BadInputError(
            f"--input '{address}' is no data set on the hub; write {_HUB_DATASETS}OWNER/NAME"
        )
    owner, _, rest = address.removeprefix(_HUB_DATASETS).partition("/")
    name, slash, path = rest.partition("/")
    name, _, written = name.partition("@")
    wanted = written or revision or "main"
    if not _COMMIT.fullmatch(wanted):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            wanted = str(HfApi().dataset_info(f"{owner}/{name}", revision=wanted).sha)
        except RepositoryNotFoundError as error:
            raise BadInputError(
                f"there is no data set {owner}/{name} on the hub for you; check the name, or log in"
                " with `hf auth login` where it is gated"
            ) from error
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise BadInputError(
                f"cannot reach the data set {owner}/{name} at '{wanted}' on the hub"
                f" ({str(error).splitlines()[0]}); check the network, or download it and pass its"
                " folder as --input"
            ) from error
    return f"{_HUB_DATASETS}{owner}/{name}@{wanted}{slash}{path}"


def _on_hub(address: str, endings: Sequence[str]) -> list[SourceFile]:
    path = address.removeprefix(HUB)
    look = _hub().glob if any(mark in path for mark in "*?[") else _hub().find
    try:
        details: dict[str, Any] = look(path, detail=True)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise BadInputError(f"cannot list {address} on the hub ({reason})") from error
    data_set = path.split("@")[0]
    found = []
    for place, entry in sorted(details.items()):
        if entry["type"] == "file" and _fits(place.rsplit("/", 1)[-1], endings):
            name = place.removeprefix(data_set).split("/", 1)[-1]
            published = (entry.get("lfs") or {}).get("sha256") or entry.get("blob_id")
            print_ = _digest(str(published or entry["name"]))
            found.append(SourceFile(HUB + place, name, int(entry["size"] or 0), print_))
    return found


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
