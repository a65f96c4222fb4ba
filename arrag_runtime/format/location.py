"""Places by name: a local path or a bucket prefix (`s3://bucket/prefix`, `gs://…`), as text.

Lance takes such text as it is. What is no table (manifests, the codebook, the files of an index)
goes through the functions here: on a disk by a temporary file and a rename, on a store by a single
PUT, so that a reader sees the old file or the whole new one.

Credentials are those of the environment, as Arrow and Lance both read them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or a role of the machine; AWS_REGION; AWS_ENDPOINT_URL for
another server than Amazon's, with AWS_ALLOW_HTTP=true where that speaks plain http. For gs://
GOOGLE_APPLICATION_CREDENTIALS or a role of the machine; GOOGLE_BASE_URL for another server, with
GOOGLE_ALLOW_HTTP=true where that speaks plain http. One without a login takes two more: a key file
in GOOGLE_SERVICE_ACCOUNT that says so to Lance, and GOOGLE_SKIP_SIGNATURE=true for Arrow.
"""

import hashlib
import os
import re
import shutil
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from arrag_runtime.format.errors import BadInputError

_STORES = ("s3", "gs")
_OLD = ".old-"
_YES = ("1", "true", "yes")
_COPIED_AT_ONCE = 8 << 20
_PATIENCE = timedelta(seconds=20)
"""For a request to Google; Arrow would try for a quarter of an hour, also to find credentials."""
_STORE_ERRORS = (
    r"google::cloud::.*with a last message of (.*?)(?=\. | error_info)",
    r"(Generic (?:GCS|S3) error: .*?)(?= - Server returned|, /|$)",
    r"(.*AWS Error.*)",
)
"""What Arrow and Lance say of a store, without the places in their sources."""


def resolved_place(place: str | Path) -> str:
    """The one spelling of a place: an absolute path, or a URI without a slash at its end.

    Raises BadInputError for a scheme that is no known store, or a URI without a bucket.
    """
    text = str(place)
    scheme, found, rest = text.partition("://")
    if not found:
        return str(Path(text).expanduser().resolve())
    if scheme not in _STORES:
        raise BadInputError(
            f"'{text}' is in no known store; give a folder, or one of"
            f" {', '.join(f'{name}://BUCKET/PREFIX' for name in _STORES)}"
        )
    parts = [part for part in rest.split("/") if part]
    if not parts:
        raise BadInputError(f"'{text}' names no bucket; write {scheme}://BUCKET/PREFIX")
    return f"{scheme}://{'/'.join(parts)}"


def in_store(place: str) -> bool:
    """Whether the place is in a bucket, not on a disk of this machine."""
    return "://" in place


def join(place: str, *names: str) -> str:
    """The place of this name below another."""
    return "/".join((place, *names))


def exists(place: str) -> bool:
    """Whether there is a file, a folder, or anything below a prefix."""
    if not in_store(place):
        return Path(place).exists()
    store, path = _store(place)
    return bool(store.get_file_info(path).type.value)


def names_in(place: str) -> list[str]:
    """The names of what is in a folder, sorted; none where there is no folder."""
    if not in_store(place):
        return sorted(p.name for p in Path(place).iterdir()) if Path(place).is_dir() else []
    prefix = f"{_store(place)[1]}/"
    # In Google's buckets Arrow finds no folders, for there are none; what is below tells of them.
    below = _below(place, recursive=place.startswith("gs://"))
    return sorted({info.path.removeprefix(prefix).partition("/")[0] for info in below})


def stored_bytes(place: str) -> int:
    """The bytes of all files below a folder."""
    if not in_store(place):
        return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    return sum(info.size or 0 for info in _below(place, recursive=True))


def modified(place: str) -> float:
    """When a file was written last, in seconds since 1970, by the clock of its store."""
    if not in_store(place):
        return Path(place).stat().st_mtime
    store, path = _store(place)
    return float(store.get_file_info(path).mtime_ns) / 1e9


def read_bytes(place: str) -> bytes:
    """A small file's contents. Raises FileNotFoundError where there is none."""
    if not in_store(place):
        return Path(place).read_bytes()
    store, path = _store(place)
    with store.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(place: str, data: bytes) -> None:
    """Write a small file so that a reader sees the old one or the whole new one."""
    if in_store(place):
        store, path = _store(place)
        with store.open_output_stream(path) as stream:
            stream.write(data)
        return
    final = Path(place)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(final)


def make_folder(place: str) -> None:
    """Make a folder and those above it; a store needs none."""
    if not in_store(place):
        Path(place).mkdir(parents=True, exist_ok=True)


def delete_place(place: str) -> None:
    """Take away a file, or a folder with all that is in it; nothing where there is neither."""
    if not in_store(place):
        if Path(place).is_dir():
            shutil.rmtree(place)
        else:
            Path(place).unlink(missing_ok=True)
        return
    store, path = _store(place)
    kind = store.get_file_info(path).type.name
    if kind == "Directory" and place.startswith("gs://"):
        store.delete_dir_contents(path)
    elif kind == "Directory":
        store.delete_dir(path)
    elif kind == "File":
        store.delete_file(path)


def building_folder(parent: str, name: str) -> Path:
    """The local folder in which this name below the parent is built; it outlives a killed process.

    On a disk it lies beside its place, for a store in the cache.
    """
    if not in_store(parent):
        return Path(parent) / f".building-{name}"
    return cache_folder() / f"building-{_digest(parent.encode())}-{name}"


def put_folder(draft: Path, place: str) -> None:
    """Put a finished draft, which has a `manifest.json`, where an older folder may be.

    The draft is gone afterwards. On a disk it is renamed. On a store its files are uploaded with
    the manifest last and the old one gone before: where a manifest stands, what it describes is
    whole.
    """
    if in_store(place):
        _upload(draft, place)
        shutil.rmtree(draft)
        return
    final = Path(place)
    old = final.with_name(f"{_OLD}{final.name}")
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacements(parent: str) -> None:
    """Finish the replacements below this folder that a killed process left half done."""
    if in_store(parent):
        return
    for old in Path(parent).glob(f"{_OLD}*"):
        final = old.with_name(old.name.removeprefix(_OLD))
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def local_folder(place: str) -> Path:
    """A folder with a `manifest.json` as one on this machine, to be mapped into memory.

    One of a store is copied once into the cache (`cache_folder`) by the contents of its manifest;
    copies of its older versions go. Raises BadInputError when it is being replaced.
    """
    if not in_store(place):
        return Path(place)
    manifest = read_bytes(join(place, "manifest.json"))
    cached = cache_folder()
    kept = cached / f"{_digest(place.encode())}-{_digest(manifest)}"
    if kept.is_dir():
        return kept
    cached.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=cached) as part:
        copy = Path(part) / "copy"
        try:
            _download(place, copy)
            same = read_bytes(join(place, "manifest.json")) == manifest
        except FileNotFoundError:
            same = False
        if not same:
            raise BadInputError(f"{place} is just being replaced; try again when that is done")
        for older in cached.glob(f"{_digest(place.encode())}-*"):
            shutil.rmtree(older, ignore_errors=True)
        try:
            copy.rename(kept)
        except OSError:
            # Another process put the same copy there in the meantime.
            if not kept.is_dir():
                raise
    return kept


def _upload(folder: Path, place: str) -> None:
    last = folder / "manifest.json"
    delete_place(join(place, last.name))
    delete_place(place)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != last]
    for path in (*files, last):
        store, target = _store(join(place, path.relative_to(folder).as_posix()))
        with path.open("rb") as source, store.open_output_stream(target) as stream:
            shutil.copyfileobj(source, stream, _COPIED_AT_ONCE)


def _download(place: str, folder: Path) -> None:
    store, prefix = _store(place)
    for info in _below(place, recursive=True):
        if info.is_file:
            target = folder / info.path[len(prefix) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            with store.open_input_stream(info.path) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _COPIED_AT_ONCE)


def _below(place: str, *, recursive: bool) -> list[Any]:
    from pyarrow.fs import FileSelector

    store, path = _store(place)
    selector = FileSelector(path, allow_not_found=True, recursive=recursive)
    return list(store.get_file_info(selector))


def _store(place: str) -> tuple[Any, str]:
    """Arrow's file system of a store and the path in it, which begins with the bucket."""
    scheme, _, path = place.partition("://")
    return _filesystem(scheme, path.partition("/")[0]), path


@cache
def _filesystem(scheme: str, bucket: str) -> Any:
    from pyarrow import fs

    if scheme == "gs":
        server = _server("GOOGLE_BASE_URL", "GOOGLE_ALLOW_HTTP")
        return fs.GcsFileSystem(
            anonymous=os.environ.get("GOOGLE_SKIP_SIGNATURE", "").lower() in _YES,
            scheme=server.scheme or "https",
            endpoint_override=server.netloc or None,
            retry_time_limit=_PATIENCE,
        )
    own = "AWS_ENDPOINT_URL_S3"
    server = _server(own if os.environ.get(own) else "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if server.netloc else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        scheme=server.scheme or None,
        endpoint_override=server.netloc or None,
        allow_delayed_open=True,
    )


def _server(variable: str, allow: str) -> SplitResult:
    """The server that a variable names, empty for the store's own; plain http must be allowed."""
    server = urlsplit(os.environ.get(variable, ""))
    if server.scheme == "http" and os.environ.get(allow, "").lower() not in _YES:
        raise BadInputError(
            f"{variable} {server.geturl()} speaks plain http; set {allow}=true to allow it"
        )
    return server


def explain(error: OSError) -> str:
    """One line for people about a disk or a store that failed, with what to look at."""
    text = str(error)
    for pattern in _STORE_ERRORS:
        if said := re.search(pattern, text):
            check = "check the bucket's name, the network and the credentials (docs/cluster.md)"
            return f"{said[1]}; {check}"
    return f"{text}; check the path, its rights and the space left"


def cache_folder(given: str | None = None) -> Path:
    """Where copies of remote files are kept: as given, else $ARRAG_CACHE, else ~/.cache/arrag."""
    return Path(given or os.environ.get("ARRAG_CACHE") or "~/.cache/arrag").expanduser().absolute()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
