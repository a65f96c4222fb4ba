"""Removal where rejects are tried again: links that are suppressed, attempts around compactions."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import lance
import pyarrow as pa
import pytest

import pipeline.remove
from arrag_runtime.format.manifest import Layout
from pipeline.building.plan_shards import next_attempts
from pipeline.building.shard_worker import read_shard, shard_rows
from pipeline.compact import compact
from pipeline.info import info
from pipeline.remove import RemovalRequest
from pipeline.verify import verify
from schemas.records import Attempt, Reject, unpack_records
from schemas.settings.source import SourceSettings
from schemas.tables import REMOVED_SCHEMA
from stages.sources import open_source
from stages.tables.committer import Committer
from stages.tables.deletion import append_removed
from stages.tables.ledger import read_ledger
from tests.conftest import jpeg
from tests.pipeline.building.test_downloads import pages, worker
from tests.worlds.link_source import link_settings
from tests.worlds.removal_world import KEYS, make_database, shard_of, write_shard
from tests.worlds.servers.web import Web, serve
from tests.worlds.source_cases import records


@pytest.fixture
def web() -> Iterator[Web]:
    """Four pictures."""
    with serve(pages(4)) as server:
        yield server


def digest(number: int) -> str:
    """The sha256 of a picture of the server."""
    return hashlib.sha256(jpeg(number, 64, 64)).hexdigest()


def test_links_on_the_list_are_not_downloaded_and_bytes_on_it_not_kept(
    web: Web, tmp_path: Path
) -> None:
    """0 is known by its address, 1 by the hash its publisher lists, 2 by the bytes that come."""
    listed = tmp_path / "links.tsv"
    hashes = {1: digest(1)}
    listed.write_text("\n".join(f"{web.url(f'/{n}')}\tc\t{hashes.get(n, '')}" for n in range(4)))
    layout = Layout(tmp_path / "db")
    said = {"when": datetime.now(UTC), "why": "asked to", "receipt": "r"}
    rows = [{"url": web.url("/0")}, {"sha256": digest(1)}, {"sha256": digest(2)}]
    append_removed(
        layout, pa.Table.from_pylist([row | said for row in rows], schema=REMOVED_SCHEMA)
    )
    source = link_settings(listed)
    [shard] = open_source(source).listing(()).shards
    settings = worker(source, keep_images=str(tmp_path / "kept"))
    settings = type(settings)(**vars(settings) | {"database": layout.root})
    for attempt, asked, kept in (
        (Attempt(shard), ["/2", "/3"], ["00003"]),
        (Attempt(shard, 2, (0, 1, 2)), ["/2"], []),
    ):
        web.requests.clear()
        [row] = shard_rows([attempt])
        answer = read_shard(row, settings)
        assert answer["error"].to_pylist() == [None]
        items = list(unpack_records(answer["inputs"][0].as_buffer()))
        removed = {i.row for i in items if isinstance(i, Reject) and i.reason == "removed"}
        assert removed == {0, 1, 2}
        assert len(items) == len(attempt.rows or range(4))
        assert sorted(web.paths()) == asked
        tars = sorted((tmp_path / "kept").iterdir())
        found = (
            records(open_source(SourceSettings(name="webdataset", input=(str(tars[-1]),))))
            if kept
            else {}
        )
        assert list(found) == kept


def remove(layout: Layout, where: str) -> int:
    return pipeline.remove.remove(layout.root, RemovalRequest(where=where), why="why").images


def assert_sound(layout: Layout, images: int, rejects: int, removed: int) -> None:
    fields = info(layout.root)
    assert (fields["images"], fields["removed"]) == (images, removed)
    assert sum(fields["rejects"].values()) == rejects
    assert fields["inputs"] == images + rejects + removed
    assert [check for check in verify(layout.root, full=True) if not check.ok] == []


def test_rejects_are_tried_again_after_a_compaction(tmp_path: Path) -> None:
    layout = make_database(tmp_path / "db")
    assert remove(layout, "key IN ('0/1.jpg', '1/2.jpg')") == 2
    compact(layout.root)
    assert_sound(layout, 16, 3, 2)
    attempt, *_ = next_attempts(layout, read_ledger(layout), "toy", ["empty"])
    assert (attempt.shard.id, attempt.number, attempt.rows) == (shard_of(0).id, 2, (6,))
    committer = Committer(layout, KEYS)
    committer.plan_again([attempt])
    killed = write_shard(layout, 0, [60], again=True)
    for name in ("patches", "images"):
        committer._append(name, killed.fragments[name])
    assert Committer(layout, KEYS).recover(read_ledger(layout)) == 1 + killed.patches
    assert_sound(layout, 16, 3, 2)
    Committer(layout, KEYS).commit(write_shard(layout, 0, [60], again=True))
    assert_sound(layout, 17, 2, 2)
    assert remove(layout, "key = '0/6.jpg'") == 1
    assert_sound(layout, 16, 2, 3)
    compact(layout.root)
    assert_sound(layout, 16, 2, 3)
    assert lance.dataset(layout.images).count_rows() == 16
    assert (
        next_attempts(layout, read_ledger(layout), "toy", ["empty"])[0].shard.id == shard_of(1).id
    )
