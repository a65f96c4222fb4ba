"""img2dataset as the engine of a shard's download, with what it leaves unbounded bounded.

In: a shard's links and a `Fetcher`. Out: a record or a reject for every link, in their order.
img2dataset's `Downloader` runs the threads and feeds them, called in this process, with our guarded
fetch in the place of its own and original bytes instead of resized ones. Bodies over 1 MiB and all
finished pictures lie in nameless temporary files ($TMPDIR), at most `max_shard_bytes` of them and
one picture per thread more; its list of links and statistics lie in memory.
"""

import hashlib
import importlib
import importlib.util
import io
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import IO, Any

import fsspec
import pyarrow as pa

from arrag_runtime.format.errors import ShardError
from schemas.records import ImageRecord, LinkRecord, Reject
from schemas.settings.download import DownloadSettings
from stages.download.fetch import Fetcher
from stages.download.web_address import FetchError

_CHUNK = 1 << 20


class ShardDownload:
    """One shard's run: what the engine's threads and its writer share. Made for one run."""

    def __init__(
        self, links: Sequence[LinkRecord], fetcher: Fetcher, settings: DownloadSettings
    ) -> None:
        self.refused: dict[int, FetchError] = {}
        self._links, self._fetcher, self._settings = links, fetcher, settings
        self._end = time.monotonic() + settings.shard_deadline
        self._bytes = 0
        self._counting = threading.Lock()
        self._places: dict[int, tuple[int, int]] = {}
        self._written = 0
        self._failure: Exception | None = None
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> "ShardDownload":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._spool.close()

    def run(self) -> None:
        """Give every link an outcome. Raises ShardError, or what the disk raised."""
        engine = load_engine()
        engine.download_image_with_retry = self._fetch  # type: ignore[attr-defined]
        with _memory_folder() as folder:
            # URLs that Arrow can hold; the fetch takes the links' own.
            urls = [link.url.encode("utf-8", "replace").decode() for link in self._links]
            listed = pa.table({"url": urls, "row": list(range(len(urls)))})
            path = f"{folder}/links.arrow"
            with fsspec.open(path, "wb") as file, pa.ipc.new_file(file, listed.schema) as writer:
                writer.write_table(listed)
            engine.Downloader(
                sample_writer_class=lambda *_schema: self,
                # In the place of img2dataset's resizer: bytes as they came, sizes left to decoding.
                resizer=lambda body, _boxes: (body.read(), None, None, None, None, None),
                thread_count=max(1, min(self._settings.threads, len(self._links))),
                save_caption=False,
                extract_exif=False,
                output_folder=folder,
                column_list=listed.column_names,
                timeout=None,
                number_sample_per_shard=len(self._links),
                oom_shard_count=1,
                compute_hash=None,
                verify_hash_type=None,
                encode_format="jpg",
                retries=0,
                user_agent_token=None,
                disallowed_header_directives=None,
            ).download_shard((0, path))
        if (failure := self._failed()) is not None:
            raise failure
        if len(self._places) + len(self.refused) != len(self._links):
            raise ShardError(f"the engine lost links: {len(self._places)} + {len(self.refused)}")

    def _fetch(
        self, row: tuple[int, str], **_settings: object
    ) -> tuple[int, IO[bytes] | None, str | None]:
        """In the place of img2dataset's `download_image_with_retry`: its signature, never raises."""
        number = row[0]
        try:
            if self._failed() is not None:
                return number, None, "stopped"
            body = self._fetcher.fetch(self._links[number].url, self._end)
            try:
                self._check(self._links[number], body)
            except BaseException:
                body.close()
                raise
            return number, body, None
        except FetchError as refusal:
            self.refused[number] = refusal
            return number, None, refusal.reason
        except Exception as error:  # A full disk, or a mistake of ours: the shard fails with it.
            self._stop(error)
            return number, None, "stopped"

    def _check(self, link: LinkRecord, body: IO[bytes]) -> None:
        """Count the bytes, and compare their hash with the publisher's where there is one."""
        size = body.seek(0, io.SEEK_END)
        with self._counting:
            self._bytes += size
            if self._bytes > self._settings.max_shard_bytes:
                raise ShardError(
                    f"its pictures have over {self._settings.max_shard_bytes} bytes; raise"
                    " --max-shard-bytes if the disk has room, or lower --max-bytes"
                )
        body.seek(0)
        if link.sha256 is None:
            return
        digest = hashlib.sha256()
        while chunk := body.read(_CHUNK):
            digest.update(chunk)
        body.seek(0)
        if digest.hexdigest() != link.sha256.lower():
            raise FetchError("sha-mismatch", f"sha256 {digest.hexdigest()}, listed {link.sha256}")

    def _failed(self) -> Exception | None:
        """What the shard fails with, as soon as it does; that its time is up is such a thing."""
        if self._failure is None and time.monotonic() >= self._end:
            done = len(self._places) + len(self.refused)
            self._stop(
                ShardError(
                    f"given up after {self._settings.shard_deadline:g} s with {done} of"
                    f" {len(self._links)} links answered; raise --shard-deadline or"
                    " --download-threads"
                )
            )
        return self._failure

    def _stop(self, error: Exception) -> None:
        """Let the shard fail with this; links that are still waiting are not fetched."""
        if self._failure is None:
            self._failure = error

    def write(
        self, data: bytes | None, _key: str, _caption: str | None, meta: dict[str, Any]
    ) -> None:
        """In the place of img2dataset's sample writer, called by one thread; never raises."""
        if data is None or self._failure is not None:
            return
        try:
            self._spool.write(data)
            self._places[meta["row"]] = self._written, len(data)
            self._written += len(data)
        except Exception as error:
            self._stop(error)

    def close(self) -> None:
        """In the place of img2dataset's sample writer, which is closed when all is written."""
        self._spool.flush()

    def records(self) -> Iterator[ImageRecord | Reject]:
        """The outcomes in the order of the links; a picture is read when its turn comes."""
        for number, link in enumerate(self._links):
            if number in self.refused:
                why = self.refused[number]
                yield Reject(link.row, link.key, "download", why.reason, why.detail, link.url)
            else:
                place, size = self._places[number]
                self._spool.seek(place)
                yield ImageRecord(
                    row=link.row,
                    key=link.key,
                    data=self._spool.read(size),
                    caption=link.caption,
                    url=link.url,
                    licence=link.licence,
                    metadata=link.metadata,
                    faces=link.faces,
                )


def load_engine() -> ModuleType:
    """img2dataset's downloader module as a copy of our own.

    A function of it is replaced for one shard, and nobody else's img2dataset is touched. The
    package itself is not imported: it would take seconds and look for updates on the network.
    """
    found = importlib.util.find_spec("img2dataset")
    if found is None or found.submodule_search_locations is None:
        raise ShardError(
            "img2dataset is not installed; install the extra: pip install arrag[build]"
        )
    name = f"_engine_{uuid.uuid4().hex}"
    package = ModuleType(name)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.downloader")
    finally:
        for loaded in [module for module in sys.modules if module.startswith(name)]:
            del sys.modules[loaded]


@contextmanager
def _memory_folder() -> Iterator[str]:
    """A folder in fsspec's memory, for the engine's list of links and its statistics."""
    folder = f"memory://arrag-{uuid.uuid4().hex}"
    try:
        yield folder
    finally:
        files, path = fsspec.core.url_to_fs(folder)
        if files.exists(path):
            files.rm(path, recursive=True)
