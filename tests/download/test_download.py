"""A shard of links: the order of its rows, its bounds, and an engine that leaves nothing behind."""

import errno
import hashlib
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from arrag_runtime.format.errors import ShardError
from schemas.records import (
    Attempt,
    ImageRecord,
    LinkRecord,
    Reject,
    Shard,
    pack_records,
    unpack_records,
)
from schemas.settings.download import DownloadSettings
from stages.download.download_links import download_links
from stages.download.engine import load_engine
from tests.worlds.servers.web import Web, answer, raw, serve, silent

FIRST = Attempt(Shard("links", "0" * 16, ()))
SETTINGS = DownloadSettings(threads=6, timeout=15, allow_private_hosts=True)
Outcomes = list[ImageRecord | Reject]


def body(number: int) -> bytes:
    return str(number).encode() * (number + 1)


def late(connection: socket.socket) -> None:
    """The first page, when all others have been answered."""
    time.sleep(0.3)
    answer(body(0))(connection)


def links(web: Web, count: int) -> list[LinkRecord]:
    """Links to /0, /1 and so on, with everything that a link can carry."""
    faces = ((0.0, 0.1, 0.5, 0.6),)
    return [
        LinkRecord(n, f"k{n}", web.url(f"/{n}"), f"caption {n}", "CC0", f'{{"n": {n}}}', faces)
        for n in range(count)
    ]


def downloaded(
    items: list[Any], settings: DownloadSettings = SETTINGS, attempt: Attempt = FIRST
) -> Outcomes:
    return list(download_links(items, settings, attempt))


@pytest.fixture
def web() -> Iterator[Web]:
    """Sixty pages, each with a body of its own."""
    with serve({f"/{n}": answer(body(n)) for n in range(60)}) as server:
        yield server


def test_outcomes_come_in_the_order_of_rows_however_threads_finish(web: Web) -> None:
    """What is no link keeps its place; what a link carries is on its picture."""
    web.pages["/0"] = late
    web.pages["/7"] = answer(b"?", "404 Not Found")
    items: list[Any] = links(web, 30)
    items[3] = Reject(3, "k3", "read", "missing", "no address")
    items[9] = ImageRecord(9, "k9", b"at hand")
    found = downloaded(items)
    assert [item.row for item in found] == list(range(30))
    assert found[3] == items[3]
    assert found[9] == items[9]
    assert found[7] == Reject(7, "k7", "download", "http-404", "status 404 Not Found", items[7].url)
    for row in (0, 1, 29):
        link = items[row]
        assert found[row] == ImageRecord(
            row=row,
            key=link.key,
            data=body(row),
            caption=link.caption,
            url=link.url,
            licence=link.licence,
            metadata=link.metadata,
            faces=link.faces,
        )


def test_a_shard_without_links_passes_through_unread(web: Web) -> None:
    """Pictures of a tar are not gathered first, and no engine is loaded for them."""
    pulled = []

    def pictures() -> Iterator[ImageRecord]:
        for row in range(3):
            pulled.append(row)
            yield ImageRecord(row, "k", b"x")

    passing = download_links(pictures(), SETTINGS, FIRST)
    assert next(passing).row == 0
    assert pulled == [0]
    assert len(list(passing)) == 2


def test_only_the_bytes_that_were_listed_are_taken(web: Web) -> None:
    good, bad = (hashlib.sha256(body(1)).hexdigest().upper(), hashlib.sha256(b"").hexdigest())
    items = [
        LinkRecord(0, "a", web.url("/1"), sha256=good),
        LinkRecord(1, "b", web.url("/1"), sha256=bad),
    ]
    first, second = downloaded(items)
    assert isinstance(first, ImageRecord)
    assert isinstance(second, Reject)
    assert second.reason == "sha-mismatch"
    assert bad in second.detail


@pytest.mark.parametrize("url", ["", "\ud800", "file:///etc/passwd", "http://nul\0.example/"])
def test_a_link_that_is_no_address_is_a_reject_like_others(url: str) -> None:
    (found,) = downloaded([LinkRecord(0, "a", url)])
    assert isinstance(found, Reject)
    assert found.reason == "bad-url"
    (packed,) = unpack_records(pack_records([found]))
    assert packed.key == "a"


def test_a_shard_that_stalls_is_given_up_at_its_deadline(web: Web) -> None:
    """Links in the air end with it, those that wait are not begun."""
    web.pages.update(dict.fromkeys(web.pages, silent))
    hasty = DownloadSettings(threads=4, timeout=60, allow_private_hosts=True, shard_deadline=0.5)
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"given up after 0\.5 s with \d+ of 60 links answered"):
        downloaded(links(web, 60), hasty)
    assert time.monotonic() - started < 5
    assert len(web.requests) <= 8


def test_a_deadline_that_passes_in_the_last_link_counts_too(web: Web) -> None:
    web.pages["/0"] = silent
    hasty = DownloadSettings(threads=4, timeout=60, allow_private_hosts=True, shard_deadline=0.5)
    with pytest.raises(ShardError, match="given up"):
        downloaded(links(web, 3), hasty)


def test_a_shards_bytes_are_bounded(web: Web) -> None:
    """Pictures that are finished lie on disk, so there must be an end to them."""
    small = DownloadSettings(threads=4, timeout=5, allow_private_hosts=True, max_shard_bytes=1500)
    assert sum(len(body(n)) for n in range(30)) < 1500
    assert len(downloaded(links(web, 30), small)) == 30
    with pytest.raises(ShardError, match="over 1500 bytes; raise --max-shard-bytes"):
        downloaded(links(web, 60), small)


@pytest.mark.parametrize(
    ("away", "status", "fails"),
    [
        (60, "503 Busy", True),
        (55, "503 Busy", True),
        (54, "503 Busy", False),
        (55, "429 Slow down", True),
        (60, "404 Not Found", False),
    ],
)
def test_a_reason_that_dominates_fails_the_shard(
    web: Web, away: int, status: str, fails: bool
) -> None:
    """Over 90 % for a reason that may lie with us; a list of dead links is another matter."""
    web.pages.update({f"/{n}": answer(b"?", status) for n in range(away)})
    if not fails:
        assert sum(isinstance(i, Reject) for i in downloaded(links(web, 60))) == away
        return
    with pytest.raises(ShardError, match=f"{away} of 60 links failed with 'http-"):
        downloaded(links(web, 60))


def test_few_links_and_links_tried_again_may_all_fail(web: Web) -> None:
    web.pages.update(dict.fromkeys(web.pages, answer(b"?", "503 Busy")))
    assert len(downloaded(links(web, 49))) == 49
    again = Attempt(FIRST.shard, 2, tuple(range(60)))
    assert len(downloaded(links(web, 60), attempt=again)) == 60


def test_a_full_disk_fails_the_shard_with_its_own_error(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """img2dataset would print the error, lose the picture and go on."""
    real = tempfile.TemporaryFile

    class Full:
        def __init__(self) -> None:
            self._file = real()

        def write(self, _data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr("stages.download.engine.tempfile.TemporaryFile", Full)
    with pytest.raises(OSError, match="No space left"):
        downloaded(links(web, 5))


def test_the_engine_is_a_copy_and_leaves_nothing(
    web: Web,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No file, no entry in fsspec's memory, no output, no signal handler, no thread, no module."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    web.pages["/3"] = raw(b"nonsense")
    handler, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    passing = download_links(links(web, 20), SETTINGS, FIRST)
    assert next(passing).row == 0
    assert list(tmp_path.iterdir()) == []
    assert len(list(passing)) == 19
    assert list(tmp_path.iterdir()) == []
    assert not [path for path in fsspec.filesystem("memory").find("/") if "arrag" in path]
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not [name for name in sys.modules if name.startswith("_engine")]
    waited = time.monotonic() + 5
    while threading.active_count() > threads + 1 and time.monotonic() < waited:
        time.sleep(0.01)
    assert threading.active_count() <= threads + 1
    assert load_engine().download_image_with_retry.__module__.startswith("_engine")


def test_what_is_not_read_to_its_end_is_let_go(web: Web, tmp_path: Path) -> None:
    """The encoder may fail in the middle of a shard."""
    passing = download_links(links(web, 20), SETTINGS, FIRST)
    assert next(passing).row == 0
    passing.close()  # type: ignore[attr-defined]
    assert len(downloaded(links(web, 5))) == 5


def test_packed_records_lie_in_a_mapped_file(tmp_path: Path, monkeypatch: Any) -> None:
    """A shard of large pictures takes disk, not memory, and the file has no name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    items = [ImageRecord(n, str(n), bytes([n]) * 3_000_000) for n in range(20)]
    peak: list[int] = []

    def counted() -> Iterator[ImageRecord]:
        import pyarrow as pa

        for item in items:
            peak.append(pa.total_allocated_bytes())
            yield item

    packed = pack_records(counted())
    assert list(tmp_path.iterdir()) == []
    assert packed.size > 60_000_000
    assert max(peak) - peak[0] < 40_000_000
    assert list(unpack_records(packed)) == items
