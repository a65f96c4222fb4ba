"""Data sets on the hub: pinned to a commit, listed, read by ranges, against a server on loopback."""

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from arrag_runtime.format.errors import BadInputError
from schemas.records import RecordedShard
from schemas.settings.source import SourceSettings
from stages.sources import locate_source, open_source
from stages.sources.reading.files import UnreachableError, find_files, locate
from tests.worlds.source_cases import (
    datacomp_rows,
    items_of,
    journeydb_of,
    open_at,
    parquet_of,
    records,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's interface that reading a data set needs, over a folder's files."""

    root: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = "/api/datasets/owner/name"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._send({"id": "owner/name", "sha": COMMIT, "siblings": [], "private": False})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            folder = self.root / below
            if folder.is_dir():
                deep = "recursive=true" in self.path.lower()
                found = sorted(folder.rglob("*") if deep else folder.iterdir())
                self._send([self._entry(file) for file in found])
            else:
                self._missing("EntryNotFound")
        elif path.startswith(f"/datasets/owner/name/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/datasets/owner/name/resolve/{COMMIT}/")
            self._send_file((self.root / name).read_bytes())
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}")
        paths = asked.get("paths", [])
        files = [self.root / path for path in ([paths] if isinstance(paths, str) else paths)]
        self._send([self._entry(file) for file in files if file.exists()])

    def _entry(self, file: Path) -> dict[str, Any]:
        name = str(file.relative_to(self.root))
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"oid": digest, "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(data), "oid": "1" * 40, "lfs": lfs}

    def _send(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, data: bytes) -> None:
        wanted = self.headers.get("Range")
        start, stop = 0, len(data)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("ETag", '"x"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub whose data set owner/name holds what is in its `root`."""
    from huggingface_hub import HfFileSystem, constants

    root = tmp_path / "hub"
    root.mkdir()
    handler = type("Here", (Hub,), {"root": root})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        HfFileSystem.clear_instance_cache()
        yield handler
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()


def test_a_data_set_is_pinned_and_read_where_it_lies(hub: type[Hub], tmp_path: Path) -> None:
    """By its name or its address, whole or a part; workers get the commit, not the branch."""
    for n in range(2):
        parquet_of(hub.root / "metadata" / f"{n}.parquet", datacomp_rows(5 + n))
    parquet_of(hub.root / "other" / "x.parquet", datacomp_rows(30))
    (hub.root / "README.md").write_text("about")
    whole = locate_source(SourceSettings(name="datacomp", input=("owner/name",)))
    assert whole.input == (f"hf://datasets/owner/name@{COMMIT}",)
    assert open_source(whole).count().inputs == 41
    part = locate_source(
        SourceSettings(name="datacomp", input=("hf://datasets/owner/name/metadata",))
    )
    assert part.input == (f"hf://datasets/owner/name@{COMMIT}/metadata",)
    source = open_source(part)
    listed = source.listing(()).shards
    names = {shard.members[0].split(" ", 3)[3] for shard in listed}
    assert names == {"metadata/0.parquet", "metadata/1.parquet"}
    assert [item.key for item in source.read(listed[1])] == [f"{n:032x}" for n in range(6)]
    some = locate_source(
        SourceSettings(name="datacomp", input=("hf://datasets/owner/name/metadata/1*.parquet",))
    )
    assert open_source(some).count().inputs == 6
    assert len(open_source(whole).listing([RecordedShard(s, 5) for s in listed]).shards) == 1


def test_archives_on_the_hub_are_streams(hub: type[Hub], tmp_path: Path) -> None:
    """JourneyDB's layout without a download: pictures and captions as from a folder."""
    journeydb_of(tmp_path / "local")
    shutil.copytree(tmp_path / "local" / "data", hub.root / "data")
    located = locate_source(
        SourceSettings(
            name="journeydb", input=("hf://datasets/owner/name/data/train",), shard_size=3
        )
    )
    there = records(open_source(located))
    here = records(open_at("journeydb", tmp_path / "local"))
    assert {k: (i.data, i.caption) for k, i in there.items()} == {
        k: (i.data, i.caption) for k, i in here.items()
    }


def test_a_network_that_fails_is_no_damage(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard fails and can be tried again; its pictures do not become rejects."""
    monkeypatch.setattr("huggingface_hub.hf_file_system.http_backoff", _unreachable)
    journeydb_of(tmp_path / "local", counts=(3,))
    shutil.copytree(tmp_path / "local" / "data", hub.root / "data")
    parquet_of(hub.root / "t" / "a.parquet", datacomp_rows(3))
    for name, below in (("journeydb", "data/train"), ("parquet", "t")):
        located = locate_source(
            SourceSettings(name=name, input=(f"hf://datasets/owner/name/{below}",))
        )
        source = open_source(located)
        with pytest.raises(UnreachableError, match=r"cannot read hf://.*no way there"):
            items_of(source)


def _unreachable(*_words: Any, **_named: Any) -> None:
    raise ConnectionError("no way there")


def test_what_the_hub_does_not_have_is_one_line(hub: type[Hub], tmp_path: Path) -> None:
    """An unknown data set, a name that is no data set's, one without such files."""
    for given, said in (
        ("owner/gone", "no data set owner/gone on the hub for you"),
        ("hf://models/owner/name", "is no data set on the hub"),
    ):
        with pytest.raises(BadInputError, match=said) as caught:
            locate(given, None)
        assert "\n" not in str(caught.value)
    (hub.root / "README.md").write_text("about")
    with pytest.raises(BadInputError, match=r"names no \.parquet file"):
        find_files([locate("owner/name", None)], (".parquet",), "parquet")
    existing = tmp_path / "owner"
    existing.mkdir()
    assert locate(str(existing), None) == str(existing)
    assert locate("owner/name", COMMIT) == f"hf://datasets/owner/name@{COMMIT}"
