"""The cc12m source: lines as they come, shards that follow them, and lists from a publisher."""

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from arrag_runtime.format.errors import BadInputError
from schemas.records import LinkRecord, RecordedShard, Reject
from schemas.settings.source import SourceSettings
from stages.sources import locate_source, open_source
from stages.sources.cc12m import Extent
from stages.sources.reading.files import find_files
from stages.sources.reading.publisher import fetch_published
from stages.sources.reading.text_lines import LONGEST_LINE, lines_from, scan_lines
from tests.worlds.source_cases import items_of, open_at, read_all, tsv_of

ODD_LINES: list[tuple[bytes, str | tuple[str, str | None]]] = [
    (b"http://a/1.jpg\ta caption", ("http://a/1.jpg", "a caption")),
    (b"http://a/2.jpg\ta caption\r", ("http://a/2.jpg", "a caption")),
    (b'http://a/3.jpg\t"tab\tinside ""quotes"""', ("http://a/3.jpg", 'tab\tinside "quotes"')),
    (b"http://a/4.jpg\ttwo\ttabs", ("http://a/4.jpg", "two\ttabs")),
    (b'http://a/5.jpg\t"a" and "b"', ("http://a/5.jpg", 'a and "b"')),
    (b"http://a/6.jpg\t", ("http://a/6.jpg", None)),
    (b"http://a/7.jpg\tcaf\xe9", ("http://a/7.jpg", "caf�")),
    ("http://ä/8.jpg\t红楼梦".encode(), ("http://ä/8.jpg", "红楼梦")),
    (b" http://a/9 9.jpg \tx", ("http://a/9 9.jpg", "x")),
    (b"file:///etc/passwd\tx", ("file:///etc/passwd", "x")),
    (b"http://a/\x0010.jpg\tx", ("http://a/\x0010.jpg", "x")),
    (b"", "the line is empty"),
    (b"\r", "the line is empty"),
    (b"http://a/no-tab.jpg", "no tab"),
    (b"\tonly a caption", "no address"),
    (b'""\tquoted nothing', "no address"),
    (b"http://a/\xff.jpg\tx", "no UTF-8"),
    (b"http://a/long.jpg\t" + b"x" * (LONGEST_LINE + 1), "longer than"),
]


def test_every_line_is_an_input(tmp_path: Path) -> None:
    """A link, or a reject that says what is wrong with the line; in order, none dropped."""
    (tmp_path / "odd.tsv").write_bytes(b"\n".join(line for line, _ in ODD_LINES) + b"\n")
    for size in (None, 5):
        items = items_of(open_at("cc12m", tmp_path / "odd.tsv", shard_size=size))
        assert len(items) == len(ODD_LINES)
        for number, (item, (_, expected)) in enumerate(zip(items, ODD_LINES, strict=True)):
            assert item.key == str(number)
            if isinstance(expected, str):
                assert isinstance(item, Reject)
                assert (item.stage, item.reason) == ("read", "bad-line")
                assert expected in item.detail
                assert len(item.detail) < 500
            else:
                assert isinstance(item, LinkRecord)
                assert (item.url, item.caption) == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n"])
def test_a_last_line_counts_with_and_without_an_end(tmp_path: Path, end: bytes) -> None:
    """Inputs are lines as a text editor counts them."""
    (tmp_path / "l.tsv").write_bytes(b"http://a/1\tx\nhttp://a/2\ty" + end)
    items = items_of(open_at("cc12m", tmp_path / "l.tsv"))
    assert len(items) == 3 if end == b"\n\n" else 2
    assert [i.url for i in items[:2]] == ["http://a/1", "http://a/2"]


def test_an_empty_list_has_no_shards(tmp_path: Path) -> None:
    (tmp_path / "l.tsv").write_bytes(b"")
    source = open_at("cc12m", tmp_path / "l.tsv")
    assert not source.listing(()).shards
    assert source.count().inputs == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")), max_size=20),
    ended=st.booleans(),
    size=st.integers(1, 7),
    chunk=st.integers(1, 9),
)
def test_offsets_and_hashes_are_those_of_the_lines(
    tmp_path: Path, lines: list[bytes], ended: bool, size: int, chunk: int
) -> None:
    """Whatever the chunks are cut like: offsets by splitting, hashes of windows by reading anew."""
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    assume(not data.startswith(b"\x1f\x8b"))  # It would be taken for gzip.
    expected = data.split(b"\n")
    expected = expected[:-1] if expected[-1] == b"" else expected
    (tmp_path / "l.tsv").write_bytes(data)
    (file,) = find_files([str(tmp_path / "l.tsv")], (".tsv",), "cc12m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.sources.reading.text_lines._CHUNK", chunk)
        scan = scan_lines(file, size, {(1, 4)})
        assert scan.lines == len(expected)
        for number, offset in scan.offsets.items():
            assert data[:offset].count(b"\n") == number or number == len(expected)
            rest = [line.data for line in lines_from(file, offset)]
            assert rest == [line.removesuffix(b"\r") for line in expected[number:]]
        for (start, stop), digest in scan.digests.items():
            content = b"\n".join(expected[start:stop])
            assert hashlib.blake2b(content, digest_size=8).hexdigest() == digest


def test_a_worker_reads_its_own_bytes_only(tmp_path: Path) -> None:
    """The members say where a shard begins; the rest of the file may be anything."""
    path = tsv_of(tmp_path / "l.tsv", 20)
    source = open_at("cc12m", path, shard_size=6)
    shards = list(source.listing(()).shards)
    begins = [Extent.of(shard).begin for shard in shards]
    lines = path.read_bytes().splitlines(keepends=True)
    assert begins == [sum(map(len, lines[:n])) for n in (0, 6, 12, 18)]
    assert Extent.of(shards[-1]).end == path.stat().st_size
    moved = path.rename(tmp_path / "elsewhere.tsv")
    found = [i.url for i in open_at("cc12m", moved).read(shards[2]) if isinstance(i, LinkRecord)]
    assert found == [f"https://host{n}.example/{n}.jpg" for n in range(12, 18)]


def test_what_is_recorded_to_the_end_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed build of a plain list starts at once."""
    source = open_at("cc12m", tsv_of(tmp_path / "l.tsv", 20), shard_size=6)
    planned = [RecordedShard(s) for s in source.listing(()).shards]

    def fail(*_words: Any, **_named: Any) -> None:
        raise AssertionError("the list was read again")

    monkeypatch.setattr("stages.sources.cc12m.scan_lines", fail)
    again = source.listing(planned)
    assert list(again.shards) == [r.shard for r in planned]
    assert not source.listing([RecordedShard(r.shard, 6) for r in planned]).shards


def test_another_list_leaves_planned_shards_alone(tmp_path: Path) -> None:
    """What was planned of a list that is not given now is noted, and refused when read."""
    source = open_at("cc12m", tsv_of(tmp_path / "a.tsv", 5))
    (shard,) = source.listing(()).shards
    other = open_at("cc12m", tsv_of(tmp_path / "b.tsv", 5, start=50))
    listing = other.listing([RecordedShard(shard)])
    assert shard.id not in {s.id for s in listing.shards}
    assert "1 shard" in " ".join(listing.notes)
    with pytest.raises(BadInputError, match=r"a\.tsv.*every node"):
        list(other.read(shard))


@pytest.mark.parametrize("cut", [0.5, 0.9, 0.99])
def test_a_truncated_gzip_gives_what_came_before_and_one_reject(tmp_path: Path, cut: float) -> None:
    """The damage is an input of its own, and the line that it falls into is not taken for whole."""
    whole = tsv_of(tmp_path / "l.tsv", 3000).read_bytes()
    packed = gzip.compress(whole)
    path = tmp_path / "cut.tsv.gz"
    path.write_bytes(packed[: int(len(packed) * cut)])
    found = read_all(open_at("cc12m", path, shard_size=700))
    items = [item for group in found.values() for item in group]
    assert all(len(group) == 700 for group in list(found.values())[:-1])
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [item.key for item in rejects] == [items[-1].key]
    assert "damaged" in rejects[0].detail
    urls = [item.url for item in items[:-1]]
    assert urls == [f"https://host{n}.example/{n}.jpg" for n in range(len(urls))]
    assert len(urls) > 100


def test_a_count_is_an_estimate_for_long_lists(tmp_path: Path) -> None:
    """From the first megabyte, plain or packed, within a few per cent; it says so."""
    path = tsv_of(tmp_path / "l.tsv", 100_000)
    (tmp_path / "l.tsv.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    for name in ("l.tsv", "l.tsv.gz"):
        count = open_at("cc12m", tmp_path / name).count()
        assert not count.exact
        assert "estimated" in count.note
        assert 90_000 < count.inputs < 115_000
    some = open_at("cc12m", path, where="caption like '%7'").count()
    assert 8_000 < some.inputs < 13_000


class Breaking(http.server.BaseHTTPRequestHandler):
    """Serves `content`, at most `at_most` bytes an answer, with ranges when asked for them."""

    content = b""
    at_most = 1 << 30
    etag: str | None = '"one"'
    ranges = True
    asked: list[tuple[str | None, str | None]]

    def do_GET(self) -> None:
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.asked.append((wanted, self.headers.get("If-Range")))
        if self.path == "/gone.tsv":
            self.send_error(404)
            return
        same = self.headers.get("If-Range") in (None, kind.etag)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and same and kind.ranges else 0
        body = kind.content[start:]
        self.send_response(206 if start else 200)
        if start:
            end = len(kind.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(kind.content)}")
        if kind.etag:
            self.send_header("ETag", kind.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: kind.at_most])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[tuple[type[Breaking], str]]:
    """A publisher on this machine whose connections break off; its handler and its address."""
    content = tsv_of(tmp_path / "published", 500).read_bytes()
    handler = type("Here", (Breaking,), {"content": content, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}/cc12m.tsv"
        server.shutdown()
        thread.join()


def test_a_list_that_breaks_off_is_resumed(
    publisher: tuple[type[Breaking], str], tmp_path: Path
) -> None:
    """Each attempt goes on where the last one ended; the result is the file, and it is kept."""
    handler, url = publisher
    handler.at_most = len(handler.content) // 3
    path = fetch_published(url, tmp_path / "cache", pause=0)
    assert path.read_bytes() == handler.content
    third = len(handler.content) // 3
    starts = [f"bytes={third * n}-" for n in range(1, len(handler.asked))]
    assert handler.asked == [(None, None), *((start, '"one"') for start in starts)]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]
    asked = len(handler.asked)
    settings_ = SourceSettings(name="cc12m", input=(url,), cache=str(tmp_path / "cache"))
    located = locate_source(settings_)
    assert located.input == (str(path),)
    assert len(handler.asked) == asked
    assert len(items_of(open_source(located))) == 500


@pytest.mark.parametrize("change", ["another version", "no ranges", "no version"])
def test_a_list_that_cannot_be_resumed_is_fetched_anew(
    publisher: tuple[type[Breaking], str], tmp_path: Path, change: str
) -> None:
    """Halves of two versions are never put together."""
    handler, url = publisher
    handler.etag = None if change == "no version" else handler.etag
    handler.at_most = 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.sources.reading.publisher._TRIES", 1)
        patch.setattr("stages.sources.reading.publisher._begins_at", lambda _range, _start: False)
        with pytest.raises(BadInputError, match="the same command goes on"):
            fetch_published(url, tmp_path / "cache", pause=0)
    handler.at_most = 1 << 30
    if change == "another version":
        handler.content, handler.etag = handler.content[::-1], '"two"'
    handler.ranges = change != "no ranges"
    path = fetch_published(url, tmp_path / "cache", pause=0)
    assert path.read_bytes() == handler.content


def test_a_list_that_is_not_there_is_one_line(
    publisher: tuple[type[Breaking], str], tmp_path: Path
) -> None:
    """No retries for an answer that will stay the same; nothing is left for a whole file."""
    handler, url = publisher
    with pytest.raises(BadInputError, match=r"answers 404.*--input") as caught:
        fetch_published(url.replace("cc12m", "gone"), tmp_path / "cache", pause=0)
    assert "\n" not in str(caught.value)
    assert len(handler.asked) == 1
    assert not list((tmp_path / "cache").glob("*.tsv"))
