"""Removing and compacting a database in a bucket, on servers of both stores on loopback."""

from pathlib import Path

import lance
import pytest

from arrag_runtime.format.manifest import Layout
from arrag_runtime.search.tombstones import Tombstones
from pipeline.compact import compact
from pipeline.index import index
from pipeline.info import info
from pipeline.remove import RemovalRequest, export_list, remove
from pipeline.verify import verify, verify_removed
from schemas.receipt import Receipt
from schemas.settings.index import IndexSettings
from tests.worlds.removal_world import add_shard, make_database

pytestmark = pytest.mark.slow


@pytest.fixture
def layout(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("ARRAG_CACHE", str(tmp_path / "cache"))
    return make_database(f"{bucket}/db")


def test_a_removal_in_a_bucket(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(layout.root, IndexSettings())
    hidden = Tombstones(layout)
    receipt = remove(layout.root, RemovalRequest(where="key LIKE '1/%'"), why="why")
    assert Receipt.read(layout, receipt.id) == receipt
    assert not hidden.refresh()
    monkeypatch.setattr("arrag_runtime.search.tombstones.STORE_SECONDS", 0.0)
    assert hidden.refresh()
    assert hidden.ids.tolist() == list(receipt.image_ids)
    assert not hidden.refresh()
    before = lance.dataset(layout.images).to_table(filter="key NOT LIKE '1/%'")
    assert info(layout.root)["removed_waiting"] == 6
    done = compact(layout.root)
    assert (done.images, done.indexes) == (6, ("codebook",))
    assert (
        lance.dataset(layout.images)
        .to_table()
        .sort_by("image_id")
        .equals(before.sort_by("image_id"))
    )
    assert [c for c in verify(layout.root, full=True) if not c.ok] == []
    assert [c for c in verify_removed(layout.root, receipt.id) if not c.ok] == []
    add_shard(layout, 3, [50, 51])
    compact(layout.root)
    assert [c for c in verify(layout.root, full=True) if not c.ok] == []
    assert export_list(layout.root, tmp_path / "list.csv") == 6
