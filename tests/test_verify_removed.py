"""The proof that a removal holds: what it checks, and that it names what is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from arrag_runtime.patch_index import PatchIndex
from pipeline.compact import compact
from pipeline.index import index_database
from pipeline.remove import RemovalRequest, carry_out, plan_removal
from pipeline.verify_removed import verify_removed
from schemas.manifest import IDS_FILE, Layout
from schemas.receipt import Receipt
from stages.build_index import IndexSettings
from tests.removal_world import make_database
from tests.test_remove import run

search = PatchIndex.search


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = make_database(tmp_path / "db")
    index_database(made.root, IndexSettings())
    return made


def remove(layout: Layout, where: str) -> Receipt:
    return carry_out(
        layout.root, plan_removal(layout.root, RemovalRequest(where=where)), "why", "cmd"
    )


def searches_hide(patch: pytest.MonkeyPatch, receipt: Receipt) -> None:
    """Searches leave out the pictures of a receipt."""

    def hidden(index: PatchIndex, keys: Any, k: int) -> Any:
        return search(index, keys, k, exclude=np.tile(np.array(receipt.image_ids), (len(keys), 1)))

    patch.setattr(PatchIndex, "search", hidden)


def failed(layout: Layout, receipt: Receipt) -> list[str]:
    return [check.name for check in verify_removed(layout.root, receipt.id) if not check.ok]


def test_a_removal_holds_before_and_after_compaction(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    searches_hide(monkeypatch, receipt)
    checks = {check.name: check for check in verify_removed(layout.root, receipt.id)}
    assert all(check.ok for check in checks.values())
    assert list(checks) == [
        "every picture is on the list of removed ones",
        "images cannot show them",
        "patches causal-1-skip-codebook cannot show them",
        "index flat cannot show them",
        "a search of index flat returns none of them",
    ]
    assert checks["images cannot show them"].detail.startswith("holds 6 of them, hidden")
    held = 6 - receipt.heldout
    assert checks["index flat cannot show them"].detail.startswith(f"holds {held} of them, hidden")
    assert (
        "asked with 180 keys of 6" in checks["a search of index flat returns none of them"].detail
    )
    monkeypatch.undo()
    compact(layout.root)
    checks = {check.name: check for check in verify_removed(layout.root, receipt.id)}
    assert all(check.ok for check in checks.values())
    assert checks["index flat cannot show them"].detail == "holds nothing of them"
    assert "no grids left" in checks["a search of index flat returns none of them"].detail


LISTED = "every picture is on the list of removed ones"


def test_a_picture_that_is_off_the_list_is_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = remove(layout, "key LIKE '1/%' AND split = 'database'")
    searches_hide(monkeypatch, receipt)
    lance.dataset(layout.removed).delete(f"image_id = {receipt.image_ids[1]}")
    checks = [check for check in verify_removed(layout.root, receipt.id) if not check.ok]
    assert [check.name for check in checks] == [
        LISTED,
        "images cannot show them",
        "patches causal-1-skip-codebook cannot show them",
        "index flat cannot show them",
    ]
    assert all(check.detail.endswith(f"wrong: {receipt.image_ids[1]}") for check in checks)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("images.lance", {"images cannot show them"}),
        ("patches", {"patches causal-1-skip-codebook cannot show them"}),
        ("index", {"index flat cannot show them"}),
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
    searches_hide(monkeypatch, receipt)
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
    assert check.name == "a search of index flat returns none of them"
    assert check.detail.endswith(f"wrong: {receipt.image_ids[0]}")


def test_a_damaged_index_is_no_proof(layout: Layout) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    (Path(layout.index("flat")) / IDS_FILE).unlink()
    assert "index flat can be opened" in failed(layout, receipt)


def test_the_command(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = remove(layout, "key LIKE '1/%'")
    searches_hide(monkeypatch, receipt)
    code, out, err = run(capsys, "verify", "--db", layout.root, "--removed", receipt.id)
    assert code == 0, err
    assert out.startswith(f"ok     {LISTED}: 6 pictures of receipt {receipt.id}, 6 on the list\n")
    lance.dataset(layout.removed).delete("true")
    code, out, err = run(capsys, "verify", "--db", layout.root, "--removed", receipt.id, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert err.startswith(f"error: receipt {receipt.id} does not hold: {LISTED}; images cannot")
    code, out, err = run(capsys, "verify", "--db", layout.root, "--removed", "other")
    assert (code, out, err.count("\n")) == (1, "", 1)
