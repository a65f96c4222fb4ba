"""The list of removed pictures: tombstones, suppressions, and the list as a file."""

import json
import multiprocessing
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.manifest import Layout
from arrag_runtime.search.tombstones import Tombstones
from schemas.records import ImageRecord, LinkRecord, Reject
from schemas.tables import REMOVED_SCHEMA
from stages.removal.removed_list_file import RemovedEntry, export_removed, import_removed
from stages.removal.suppression import Suppressions, read_suppressions, suppress
from stages.tables.deletion import append_removed
from tests.worlds.removal_world import sha256


def listed(*images: int | None, **fields: str) -> pa.Table:
    """Rows of the list for these ids."""
    said = {"when": datetime.now(UTC), "why": "asked to", "receipt": "r1"} | fields
    return pa.Table.from_pylist([{"image_id": i} | said for i in images], schema=REMOVED_SCHEMA)


def test_what_is_on_the_list_is_hidden_at_the_next_refresh(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    hidden = Tombstones(layout)
    asked = np.array([[1, 2, 3], [4, 5, 2**52]])
    assert not hidden.hides(asked).any()
    for ids in ((5, 2), (2**52, None), (2, 7)):
        append_removed(layout, listed(*ids))
        assert hidden.refresh()
    append_removed(layout, listed(None, 2))
    assert not hidden.refresh()
    assert hidden.ids.tolist() == [2, 5, 7, 2**52]
    assert hidden.hides(asked).tolist() == [[False, True, False], [False, True, True]]


def test_changes_within_one_tick_of_the_clock_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two removals may leave the folder with the same time of change."""
    layout = Layout(tmp_path)
    append_removed(layout, listed(1))
    stamp = time.time_ns()
    monkeypatch.setattr("arrag_runtime.search.tombstones._changed", lambda _folder: stamp)
    hidden = Tombstones(layout)
    append_removed(layout, listed(2))
    assert hidden.refresh()
    assert hidden.ids.tolist() == [1, 2]


def test_an_unchanged_list_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path)
    append_removed(layout, listed(1))
    monkeypatch.setattr("arrag_runtime.search.tombstones._changed", lambda _folder: 1)
    hidden = Tombstones(layout)
    monkeypatch.setattr(
        "arrag_runtime.search.tombstones._read", lambda *_: pytest.fail("read again")
    )
    assert not hidden.refresh()
    assert hidden.ids.tolist() == [1]


def test_a_list_that_cannot_be_read_stops_searches(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    append_removed(layout, listed(1))
    for manifest in (Path(layout.removed) / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"damaged")
    with pytest.raises(ArragError, match=r"list of removed pictures .* cannot be read"):
        Tombstones(layout)


def test_another_process_sees_a_removal_at_its_next_refresh(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    code = (
        "import sys, numpy as np, pathlib\n"
        "from arrag_runtime.search.tombstones import Tombstones\n"
        "from arrag_runtime.format.manifest import Layout\n"
        "hidden = Tombstones(Layout(pathlib.Path(sys.argv[1])))\n"
        "for line in sys.stdin:\n"
        "    hidden.refresh()\n"
        "    print(hidden.hides(np.array([int(line)]))[0], 'lance' in sys.modules, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def asked(image: int) -> str:
            other.stdin.write(f"{image}\n")  # type: ignore[union-attr]
            other.stdin.flush()  # type: ignore[union-attr]
            return other.stdout.readline().strip()  # type: ignore[union-attr]

        assert asked(9) == "False False"
        append_removed(layout, listed(9))
        assert asked(9) == "True True"
        append_removed(layout, listed(10))
        assert asked(10) == "True True"
        other.stdin.close()


def _append_some(root: str, start: int, ready: "multiprocessing.synchronize.Barrier") -> None:
    ready.wait()
    for image in range(start, start + 3):
        append_removed(Layout(Path(root)), listed(image))


def test_several_processes_may_add_at_once(tmp_path: Path) -> None:
    """Also when all of them find no list yet."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    workers = [
        context.Process(target=_append_some, args=(str(tmp_path), start, ready))
        for start in (0, 100)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert Tombstones(Layout(tmp_path)).ids.tolist() == [0, 1, 2, 100, 101, 102]


def test_what_is_on_the_list_is_suppressed(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert not read_suppressions(layout)
    append_removed(layout, listed(None, sha256=sha256(1), url="http://a.org/1.jpg"))
    append_removed(layout, listed(7, url="http://a.org/2.jpg"))
    known = read_suppressions(layout)
    assert known == Suppressions(
        hashes=frozenset([sha256(1)]),
        urls=frozenset(["http://a.org/1.jpg", "http://a.org/2.jpg"]),
    )
    bytes_of_1 = b"the bytes of picture 1"
    broken = Reject(0, "0", "read", "missing", "gone", "http://a.org/1.jpg")
    stays = ImageRecord(5, "5", b"other bytes", url="http://a.org/3.jpg")
    inputs: list[ImageRecord | LinkRecord | Reject] = [
        broken,
        LinkRecord(1, "1", "http://a.org/1.jpg"),
        LinkRecord(2, "2", "http://b.org/", sha256=sha256(1)),
        ImageRecord(3, "3", bytes_of_1, url="http://b.org/"),
        ImageRecord(4, "4", b"new bytes", url="http://a.org/2.jpg"),
        stays,
        LinkRecord(6, "6", "http://b.org/", sha256=sha256(2)),
    ]
    outcome = list(suppress(inputs, known))
    assert outcome[0] is broken
    assert outcome[5:] == [stays, inputs[6]]
    rejects = [item for item in outcome[1:5] if isinstance(item, Reject)]
    assert [(r.row, r.key, r.reason) for r in rejects] == [
        (n, str(n), "removed") for n in (1, 2, 3, 4)
    ]
    assert [r.url for r in rejects] == [
        "http://a.org/1.jpg",
        *["http://b.org/"] * 2,
        "http://a.org/2.jpg",
    ]
    assert ["bytes" in r.detail for r in rejects] == [False, True, True, False]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_list_travels_by_file(tmp_path: Path, suffix: str) -> None:
    layout = Layout(tmp_path / "one")
    why = 'he said "no",\nand meant it'
    append_removed(
        layout, listed(3, sha256=sha256(1), url="http://a.org/ü,1.jpg", key="007", why=why)
    )
    append_removed(layout, listed(None, url="http://a.org/2.jpg"))
    path = tmp_path / f"list.{suffix}"
    assert export_removed(layout, path) == 2
    assert import_removed(path) == (
        RemovedEntry(sha256=sha256(1), url="http://a.org/ü,1.jpg", key="007", why=why),
        RemovedEntry(url="http://a.org/2.jpg", why="asked to"),
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_empty_list_travels_too(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"list.{suffix}"
    assert export_removed(Layout(tmp_path), path) == 0
    assert import_removed(path) == ()


def test_lists_that_people_write(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("url,note\nhttp://a.org/1.jpg,x\n,y\n")
    assert import_removed(path) == (RemovedEntry(url="http://a.org/1.jpg"), RemovedEntry())
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"sha256": sha256(1).upper(), "key": 7}) + "\n\n")
    assert import_removed(path) == (RemovedEntry(sha256=sha256(1), key="7"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "", "has no known ending; name it with one of .csv, .jsonl, .parquet"),
        ("list.csv", "address\nx\n", "has columns address, but neither sha256 nor url"),
        ("list.csv", "sha256\n123\n", "'123' is no sha256; it has 64 hex digits"),
        ("list.jsonl", "[1]\n", "cannot read --import"),
        ("list.jsonl", "{", "cannot read --import"),
        ("list.parquet", "PAR", "cannot read --import"),
    ],
)
def test_files_that_are_no_lists(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        import_removed(tmp_path / name)
