"""The proof that a removal holds: what it checks, and that it names what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lance
import pytest

import pipeline.remove
from arrag_runtime.format.manifest import Layout
from arrag_runtime.search.patch_index import PatchIndex
from pipeline.compact import compact
from pipeline.index import index
from pipeline.remove import RemovalRequest
from pipeline.verify import verify_removed
from schemas.receipt import Receipt
from schemas.settings.index import IndexSettings
from tests.worlds.command_line import run
from tests.worlds.removal_world import make_database

search = PatchIndex.search


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = make_database(tmp_path / "db")
    index(made.root, IndexSettings())
    return made


def remove(layout: Layout, where: str) -> Receipt:
    return pipeline.remove.remove(layout.root, RemovalRequest(where=where), why="why")


def failed(layout: Layout, receipt: Receipt) -> list[str]:
    return [check.name for check in verify_removed(layout.root, receipt.id) if not check.ok]


def test_a_removal_holds_before_and_after_compaction(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    checks = {check.name: check for check in verify_removed(layout.root, receipt.id)}
    assert all(check.ok for check in checks.values())
    assert list(checks) == [
        "every picture is on the list of removed ones",
        "images cannot show them",
        "patches causal-1-skip-codebook cannot show them",
        "index codebook cannot show them",
        "a search of index codebook returns none of them",
    ]
    assert checks["images cannot show them"].detail.startswith("holds 6 of them, hidden")
    held = 6 - receipt.heldout
    assert checks["index codebook cannot show them"].detail.startswith(
        f"holds {held} of them, hidden"
    )
    assert (
        "asked with 180 keys of 6"
        in checks["a search of index codebook returns none of them"].detail
    )
    compact(layout.root)
    checks = {check.name: check for check in verify_removed(layout.root, receipt.id)}
    assert all(check.ok for check in checks.values())
    assert checks["index codebook cannot show them"].detail == "holds nothing of them"
    assert "no grids left" in checks["a search of index codebook returns none of them"].detail


SEARCHER = """
import sys
from arrag_runtime import PatchIndex
import pipeline.remove
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.images import ImageTable
index = PatchIndex.open(sys.argv[1])
images = ImageTable(Layout(sys.argv[1]).images)
for line in sys.stdin:
    grid = images.grids([int(line)], 7)[int(line)]
    found = index.search(index.manifest.keys.neighborhood.keys(grid[None])[0], 5).patch_ids
    print((found >> 10 == int(line)).sum(), flush=True)
"""


def test_a_process_that_has_the_index_open_stops_finding_them(layout: Layout) -> None:
    images = lance.dataset(layout.images).to_table(filter="split = 'database'", limit=3)
    first, second, third = images["image_id"].to_pylist()
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SEARCHER, layout.root], **pipes) as opened:
        other: Any = opened

        def finds(image: int) -> int:
            other.stdin.write(f"{image}\n")
            other.stdin.flush()
            return int(other.stdout.readline())

        assert finds(first) >= 30
        remove(layout, f"image_id = {first}")
        assert finds(first) == 0
        assert finds(second) >= 30
        remove(layout, f"image_id = {second}")
        assert (finds(first), finds(second)) == (0, 0)
        assert finds(third) >= 30
        other.stdin.close()


LISTED = "every picture is on the list of removed ones"


def test_a_picture_that_is_off_the_list_is_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = remove(layout, "key LIKE '1/%' AND split = 'database'")
    lance.dataset(layout.removed).delete(f"image_id = {receipt.image_ids[1]}")
    checks = [check for check in verify_removed(layout.root, receipt.id) if not check.ok]
    assert [check.name for check in checks] == [
        LISTED,
        "images cannot show them",
        "patches causal-1-skip-codebook cannot show them",
        "index codebook cannot show them",
        "a search of index codebook returns none of them",
    ]
    assert all(check.detail.endswith(f"wrong: {receipt.image_ids[1]}") for check in checks)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("images.lance", {"images cannot show them"}),
        ("patches", {"patches causal-1-skip-codebook cannot show them"}),
        ("index", {"index codebook cannot show them"}),
    ],
)
def test_what_an_old_backup_brings_back_is_named(
    layout: Layout,
    tmp_path: Path,
    part: str,
    named: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    backup = shutil.copytree(layout.root, tmp_path / "backup")
    compact(layout.root)
    lance.dataset(layout.removed).delete("true")
    shutil.rmtree(Path(layout.root) / part)
    shutil.copytree(backup / part, Path(layout.root) / part)
    assert set(failed(layout, receipt)) == {LISTED} | named


def test_a_search_that_returns_them_is_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = remove(layout, "key LIKE '1/%'")

    def returns_one(index: PatchIndex, keys: Any, k: int) -> Any:
        found = search(index, keys, k)
        found.patch_ids[7, 0] = receipt.image_ids[0] << 10 | 12
        found.patch_ids[8:] = -1
        found.patch_ids[:7] = -1
        found.patch_ids[7, 1:] = -1
        return found

    monkeypatch.setattr(PatchIndex, "search", returns_one)
    [check] = [check for check in verify_removed(layout.root, receipt.id) if not check.ok]
    assert check.name == "a search of index codebook returns none of them"
    assert check.detail.endswith(f"wrong: {receipt.image_ids[0]}")


def test_a_damaged_index_is_no_proof(layout: Layout) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    for file in Path(layout.index("codebook")).rglob("patch_ids*"):
        file.unlink()
    assert "index codebook can be opened" in failed(layout, receipt)


def test_the_command(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    code, out, err = run(capsys, "verify", "--db", layout.root, "--removed", receipt.id)
    assert code == 0, err
    assert out.startswith(f"ok     {LISTED}: 6 pictures of receipt {receipt.id}, 6 on the list\n")
    lance.dataset(layout.removed).delete("true")
    code, out, err = run(capsys, "verify", "--db", layout.root, "--removed", receipt.id, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert err.startswith(f"error: receipt {receipt.id} does not hold: {LISTED}; images cannot")
    code, out, err = run(capsys, "verify", "--db", layout.root, "--removed", "other")
    assert (code, out, err.count("\n")) == (1, "", 1)
