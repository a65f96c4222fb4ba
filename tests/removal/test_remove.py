"""Removing pictures: what is meant, what goes on the list, and the receipt."""

import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import pipeline.remove
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import image_id
from arrag_runtime.format.images import ImageTable, duplicate_images
from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import Layout
from arrag_runtime.search.tombstones import Tombstones
from pipeline.info import info
from pipeline.remove import RemovalRequest, carry_out, hide_suppressed, plan_removal
from pipeline.resources.lease import lease
from pipeline.verify import verify
from schemas.receipt import Receipt
from stages.removal.suppression import read_suppressions
from tests.worlds.command_line import run
from tests.worlds.removal_world import (
    KEYS,
    PER_IMAGE,
    add_shard,
    make_database,
    picture_bytes,
    sha256,
    shard_of,
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Three shards of six different pictures."""
    return make_database(tmp_path / "db")


def rows(layout: Layout) -> list[dict[str, Any]]:
    """The list of removed pictures, in the order of their ids."""
    listed = lance.dataset(layout.removed).to_table().to_pylist()
    return sorted(listed, key=lambda row: row["image_id"] or -1)


def remove(layout: Layout, **request: Any) -> Receipt:
    """Remove what a request names."""
    return pipeline.remove.remove(layout.root, RemovalRequest(**request), why="why")


def ids(*places: tuple[int, int]) -> list[int]:
    """The ids of the pictures in these rows of these shards, ascending."""
    return sorted(image_id(shard_of(shard).id, row) for shard, row in places)


def test_a_condition_removes_what_it_holds_for(layout: Layout) -> None:
    removal = plan_removal(layout.root, RemovalRequest(where="url LIKE '%a.org%'"))
    assert not exists(layout.removed)
    images = {row["image_id"]: row for row in lance.dataset(layout.images).to_table().to_pylist()}
    shown = [i for i in ids((0, 0), (1, 0), (2, 0)) if images[i]["split"] == "database"]
    assert (removal.images, removal.patches) == (3, {"causal-1-skip-codebook": 30 * len(shown)})
    receipt = carry_out(layout.root, removal, "takedown 12", "arrag-db remove")
    assert [row["image_id"] for row in rows(layout)] == ids((0, 0), (1, 0), (2, 0))
    for row in rows(layout):
        image = images[row["image_id"]]
        assert {name: row[name] for name in ("sha256", "url", "key", "source", "split")} == {
            name: image[name] for name in ("sha256", "url", "key", "source", "split")
        }
        assert (row["why"], row["receipt"]) == ("takedown 12", receipt.id)
    assert Receipt.read(layout, receipt.id) == receipt
    assert receipt.image_ids == tuple(ids((0, 0), (1, 0), (2, 0)))
    assert (receipt.images, receipt.heldout) == (3, 3 - len(shown))
    assert receipt.table_versions == {
        "images": lance.dataset(layout.images).version,
        "patches/causal-1-skip-codebook": lance.dataset(layout.patches(KEYS)).version,
        "removed": 2,
    }


def test_a_removal_waits_for_nobody(layout: Layout) -> None:
    with lease(layout, "arrag-db build"):
        remove(layout, image_ids=(ids((1, 1))[0],))
    assert Tombstones(layout).ids.tolist() == ids((1, 1))


def test_copies_go_too_and_are_named(layout: Layout) -> None:
    add_shard(layout, 3, [3, 100, 3, 101])
    removal = plan_removal(layout.root, RemovalRequest(image_ids=(ids((0, 3))[0],)))
    assert removal.to_text().splitlines()[0] == (
        "1 pictures match, and 2 copies with the same bytes"
    )
    assert "3/0.jpg" in removal.to_text()
    receipt = carry_out(layout.root, removal, "why", "cmd")
    assert receipt.image_ids == tuple(ids((0, 3), (3, 0), (3, 2)))
    assert receipt.copies == 2
    again = plan_removal(layout.root, RemovalRequest(hashes=(sha256(3).upper(),)))
    assert (again.images, again.found.already_hidden, again.is_empty) == (0, 3, True)


def test_copies_that_stay_are_not_suppressed(layout: Layout) -> None:
    """Otherwise the next build would turn away what the database still holds."""
    add_shard(layout, 3, [3, 100])
    remove(layout, image_ids=(ids((0, 3))[0],), only_these=True)
    [row] = rows(layout)
    assert (row["sha256"], row["url"]) == (None, "http://b.org/0/3.jpg")
    assert read_suppressions(layout).hashes == frozenset()
    remove(layout, image_ids=(ids((3, 0))[0],), only_these=True)
    assert read_suppressions(layout).hashes == {sha256(3)}


def test_an_address_that_others_share_is_not_suppressed(layout: Layout) -> None:
    table = lance.dataset(layout.images)
    table.update({"url": "'http://album.org/'"}, f"image_id IN {tuple(ids((0, 1), (1, 1)))}")
    remove(layout, image_ids=(ids((0, 1))[0],))
    assert read_suppressions(layout).urls == frozenset()
    remove(layout, where="url = 'http://album.org/'")
    assert read_suppressions(layout).urls == {"http://album.org/"}


def test_a_file_or_a_hash_without_a_picture_here_is_suppressed(
    layout: Layout, tmp_path: Path
) -> None:
    file = tmp_path / "7.jpg"
    file.write_bytes(picture_bytes(7))
    assert remove(layout, like=(file,)).image_ids == tuple(ids((1, 1)))
    file.write_bytes(picture_bytes(500))
    receipt = remove(layout, like=(file,))
    assert (receipt.images, receipt.kept_out) == (0, 1)
    assert read_suppressions(layout).hashes == {sha256(7), sha256(500)}
    assert plan_removal(layout.root, RemovalRequest(hashes=(sha256(500),))).is_empty


def test_another_databases_list_hides_and_suppresses(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(
        f"sha256,url,why\n{sha256(4)},http://elsewhere.org/4.jpg,\n"
        f",http://b.org/1/2.jpg,\n{sha256(900)},,a judge said so\n"
    )
    receipt = remove(layout, listed=path)
    assert receipt.image_ids == tuple(ids((0, 4), (1, 2)))
    known = read_suppressions(layout)
    assert known.hashes == {sha256(4), sha256(8), sha256(900)}
    assert known.urls == {
        "http://elsewhere.org/4.jpg",
        "http://b.org/0/4.jpg",
        "http://b.org/1/2.jpg",
    }
    assert {row["why"] for row in rows(layout)} == {"why", "a judge said so"}
    assert plan_removal(layout.root, RemovalRequest(listed=path)).is_empty


def test_nothing_matches(layout: Layout) -> None:
    removal = plan_removal(layout.root, RemovalRequest(where="key = 'none'"))
    assert removal.is_empty
    assert removal.to_text() == "0 pictures match"
    assert plan_removal(layout.root, RemovalRequest(image_ids=(5,))).is_empty


def test_what_came_in_during_a_removal_is_hidden(layout: Layout) -> None:
    remove(layout, image_ids=(ids((0, 3))[0],))
    assert hide_suppressed(layout.root, "arrag-db build") is None
    add_shard(layout, 3, [100, 3])
    assert "removed pictures are hidden" in {c.name for c in verify(layout.root) if not c.ok}
    receipt = hide_suppressed(layout.root, "arrag-db build")
    assert receipt is not None
    assert receipt.image_ids == tuple(ids((3, 1)))
    assert [c for c in verify(layout.root, full=True) if not c.ok] == []


def test_info_counts_what_is_removed(layout: Layout) -> None:
    before = info(layout.root)
    add_shard(layout, 3, [3, 100])
    assert info(layout.root)["duplicates"] == 1
    receipt = remove(layout, where="key IN ('0/3.jpg', '0/4.jpg')")
    after = info(layout.root)
    assert (after["removed"], after["removed_waiting"], after["duplicates"]) == (3, 3, 0)
    assert after["inputs"] == after["images"] + sum(after["rejects"].values()) + after["removed"]
    assert after["images"] == before["images"] + 2 - 3
    assert (
        after["heldout"]
        == before["heldout"]
        + sum(
            row["split"] == "heldout"
            for row in lance.dataset(layout.images).to_table(filter="shard LIKE '%4%'").to_pylist()
        )
        - receipt.heldout
    )
    assert before["patches"] + 2 * PER_IMAGE >= after["patches"]
    assert after["patches"] == (after["images"] - after["heldout"]) * PER_IMAGE


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"where": "colour = 'red'"}, "No field named colour.*the columns are image_id, source, "),
        ({"where": "key LIKE 'x"}, "Unterminated string.*the columns are"),
        ({"where": "image_id + 3"}, "does not return a boolean; the columns are"),
        ({}, "in one way: --where, --image-id, --sha256, --like or --import"),
        ({"where": "true", "image_ids": (1,)}, "in one way"),
        ({"hashes": ("12",)}, "--sha256: '12' is no sha256"),
        ({"like": (Path("gone.jpg"),)}, "cannot read --like 'gone.jpg'"),
        ({"listed": Path("a.csv"), "only_these": True}, "leave --only-these out"),
    ],
)
def test_requests_that_cannot_be_used(
    layout: Layout, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message) as error:
        plan_removal(layout.root, RemovalRequest(**request_))
    assert "\n" not in str(error.value)
    assert "tokens" not in str(error.value)


def test_a_removal_needs_a_reason(layout: Layout) -> None:
    with pytest.raises(BadInputError, match="needs a reason"):
        pipeline.remove.remove(layout.root, RemovalRequest(where="true"), why=" ")
    assert not exists(layout.removed)


def test_receipts_that_are_none(layout: Layout, tmp_path: Path) -> None:
    receipt = remove(layout, where="key = '0/0.jpg'")
    assert Receipt.read(layout, f"{layout.receipts}/{receipt.id}.json") == receipt
    with pytest.raises(BadInputError, match=f"no receipt 'x'.*{receipt.id}"):
        Receipt.read(layout, "x")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(BadInputError, match="is no receipt"):
        Receipt.read(layout, str(tmp_path / "other.json"))


def test_duplicates_keep_the_lowest_id(layout: Layout) -> None:
    images = ImageTable(layout.images)
    assert duplicate_images(images).tolist() == []
    add_shard(layout, 3, [3, 100, 3, 9])
    add_shard(layout, 4, [100, 100])
    images = ImageTable(layout.images)
    assert duplicate_images(images).tolist() == ids((3, 0), (3, 2), (3, 3), (4, 0), (4, 1))
    hidden = np.array(ids((0, 3), (3, 1)), np.int64)
    assert duplicate_images(images, hidden).tolist() == ids((3, 2), (3, 3), (4, 1))


def test_hashes_that_begin_alike_are_no_duplicates(layout: Layout) -> None:
    table = lance.dataset(layout.images)
    for number, image in enumerate(ids((0, 1), (0, 2), (1, 1), (2, 4))):
        table.update({"sha256": f"'{'ab' * 16}{number // 2:032x}'"}, f"image_id = {image}")
    images = ImageTable(layout.images)
    assert duplicate_images(images).tolist() == ids((0, 2), (2, 4))


def test_the_command(layout: Layout, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    db = ("--db", layout.root)
    code, out, err = run(capsys, "remove", *db, "--where", "key = '0/3.jpg'")
    assert (code, err.count("\n")) == (1, 1)
    assert "give --why" in err
    code, out, err = run(capsys, "remove", *db, "--where", "key = '0/3.jpg'", "--dry-run")
    assert code == 0, err
    assert out.splitlines()[:2] == [
        "1 pictures match",
        f"  {ids((0, 3))[0]}  0/3.jpg  http://b.org/0/3.jpg",
    ]
    assert not exists(layout.removed)
    code, out, err = run(capsys, "remove", *db, "--image-id", "1", "--why", "x", "--json")
    assert (code, "add --yes" in err) == (1, True)
    words = ("remove", *db, "--image-id", ids((0, 3))[0], "--why", "a letter", "--yes")
    code, out, err = run(capsys, *words)
    assert code == 0, err
    [receipt] = Path(layout.receipts).glob("*.json")
    assert f"Receipt {receipt.stem} is in {layout.root}/receipts" in out
    assert f"`arrag-db compact --db {layout.root}`" in out
    said = json.loads(receipt.read_text())
    assert said["command"].startswith(f"arrag-db remove --db {layout.root} --image-id")
    code, out, err = run(capsys, "remove", *db, "--export", tmp_path / "list.csv")
    assert (code, out) == (0, f"1 rows: {tmp_path / 'list.csv'}\n")
    code, out, err = run(capsys, *words[:-2], "again", "--yes", "--json")
    assert json.loads(out)["already"] == 1
