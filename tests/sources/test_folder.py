"""The folder source: what is listed, how pictures are described, what may go wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord, RecordedShard, Reject, pack_records, unpack_records
from tests.conftest import jpeg
from tests.worlds.source_cases import folder_of, open_at, open_folder, packable, read_all, records


def test_a_folder_is_read_with_captions_and_without_hidden_files(tmp_path: Path) -> None:
    """Pictures at any depth in the order of their paths; captions from the text beside them."""
    root = folder_of(tmp_path)
    for hidden in (".hidden.jpg", ".git/x.jpg", "notes.md", "deep/._p0.jpg"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(jpeg(99))
    (root / "UPPER.JPEG").write_bytes(jpeg(98))
    found = records(open_folder(root))
    assert set(found) == {"UPPER.JPEG"} | {
        f"deep/er/p{n}.jpg" if n % 3 == 0 else f"p{n}.jpg" for n in range(7)
    }
    captions = {key: item.caption for key, item in found.items() if item.caption}
    assert captions == {"p1.jpg": "caption 1", "deep/er/p3.jpg": "caption 3", "p5.jpg": "caption 5"}
    assert all(item.url is item.licence is item.metadata is None for item in found.values())


METADATA: list[dict[str, Any]] = [
    {"file_name": "p1.jpg", "text": "from metadata", "url": "http://a/1", "license": "MIT"}
    | {"score": "007", "city": "Zürich"},
    {"file_name": "deep/er/p0.jpg", "text": "deep", "url": "", "license": "", "score": "2"}
    | {"city": ""},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_files_describe_pictures(kind: str, tmp_path: Path) -> None:
    """Caption, address and licence are taken, the rest is kept, text stays text."""
    root = folder_of(tmp_path)
    table = pd.DataFrame(METADATA).rename(columns={"file_name": "path"})
    if kind == "csv":
        table.to_csv(root / "metadata.csv", index=False)
    elif kind == "jsonl":
        table.to_json(root / "metadata.jsonl", orient="records", lines=True)
    else:
        table.to_parquet(root / "metadata.parquet")
    found = records(open_folder(root))
    one, deep, other = (found[key] for key in ("p1.jpg", "deep/er/p0.jpg", "p5.jpg"))
    assert (one.caption, one.url, one.licence) == ("from metadata", "http://a/1", "MIT")
    assert json.loads(one.metadata or "") == {"score": "007", "city": "Zürich"}
    assert (deep.caption, deep.url, deep.licence) == ("deep", None, None)
    assert json.loads(deep.metadata or "")["score"] == "2"
    assert (other.caption, other.metadata) == ("caption 5", None)


def test_numbers_and_lists_in_metadata_stay_what_they_are(tmp_path: Path) -> None:
    """A value is kept as the file has it, even where other rows lack it."""
    root = folder_of(tmp_path)
    kept = {"id": 1234567890123456789, "created_at": 1700000000, "tags": ["a", "b"]}
    rows = [{"file": "p1.jpg"} | kept, {"file": "p2.jpg"}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metadata = records(open_folder(root))["p1.jpg"].metadata
    assert json.loads(metadata or "") == kept


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_metadata_lines_end_with_the_line(tmp_path: Path, encoding: str) -> None:
    """Captions from the web hold other separators, and some editors begin a file with a mark."""
    caption = "one\u2028two\x85three"
    line = json.dumps({"file_name": "p1.jpg", "caption": caption}, ensure_ascii=False)
    (folder_of(tmp_path) / "metadata.jsonl").write_text(line + "\n", encoding=encoding)
    assert records(open_folder(tmp_path))["p1.jpg"].caption == caption


def test_a_moved_folder_and_a_new_file_rename_no_shard(tmp_path: Path) -> None:
    """A shard keeps its id when the folder moves; one file more makes one shard more."""
    root = folder_of(tmp_path / "here")
    before = read_all(open_folder(root, shard_size=3))
    root.rename(tmp_path / "there")
    assert read_all(open_folder(tmp_path / "there", shard_size=3)) == before
    (tmp_path / "there" / "a-new-first.jpg").write_bytes(jpeg(50))
    recorded = [RecordedShard(shard, len(items)) for shard, items in before.items()]
    grown = open_folder(tmp_path / "there", shard_size=3)
    (fresh,) = grown.listing(recorded).shards
    assert fresh not in before
    assert [item.key for item in grown.read(fresh)] == ["a-new-first.jpg"]
    planned = [RecordedShard(shard) for shard in before]
    assert set(grown.listing(planned).shards) == {*before, fresh}


def test_planned_shards_of_another_folder_are_noted(tmp_path: Path) -> None:
    """They cannot be done from here; the listing says how many instead of failing."""
    elsewhere = open_folder(folder_of(tmp_path / "a"), shard_size=4).listing(())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jpg").write_bytes(jpeg(70))
    listing = open_folder(tmp_path / "b").listing([RecordedShard(s) for s in elsewhere.shards])
    assert len(listing.shards) == 1
    assert "2 shards" in " ".join(listing.notes)


def test_a_planned_shard_is_finished_whatever_is_wanted_now(tmp_path: Path) -> None:
    """A limit or a condition says what is to be added, not what was begun."""
    root = folder_of(tmp_path / "here")
    (root / "metadata.csv").write_text("file_name,score\np1.jpg,1\n")
    planned = open_folder(root, shard_size=3).listing(()).shards
    for options in ({"limit": 1}, {"where": "score = 1"}):
        listing = open_folder(root, **options).listing([RecordedShard(s) for s in planned])
        assert listing.shards[: len(planned)] == planned
        assert not listing.notes


def test_a_shard_is_of_one_folder(tmp_path: Path) -> None:
    """So a build of one folder leaves no picture of another as missing."""
    roots = folder_of(tmp_path / "a", 5), tmp_path / "b"
    roots[1].mkdir()
    for number in range(4):
        (roots[1] / f"q{number}.jpg").write_bytes(jpeg(40 + number))
    planned = [RecordedShard(s) for s in open_folder(*roots, shard_size=6).listing(()).shards]
    one = open_folder(roots[0])
    listing = one.listing(planned)
    items = [item for shard in listing.shards for item in one.read(shard)]
    assert sorted(item.key.rpartition("/")[2] for item in items) == [f"p{n}.jpg" for n in range(5)]
    assert not any(isinstance(item, Reject) for item in items)
    assert "1 shards planned earlier" in " ".join(listing.notes)


def test_a_file_that_could_not_be_read_comes_in_once(tmp_path: Path) -> None:
    """By the reject that it was, not as a new picture beside it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.jpg").symlink_to(tmp_path / "there.jpg")
    source = open_folder(tmp_path / "here")
    (shard,) = source.listing(()).shards
    (reject,) = source.read(shard)
    assert isinstance(reject, Reject)
    (tmp_path / "there.jpg").write_bytes(jpeg(1))
    later = open_folder(tmp_path / "here")
    assert not later.listing([RecordedShard(shard, 1)]).shards
    (found,) = later.read(shard)
    assert isinstance(found, ImageRecord)


def test_files_that_vanish_or_change_after_listing_become_rejects(tmp_path: Path) -> None:
    """Their rows stay, with a reason; the others are read."""
    source = open_folder(folder_of(tmp_path))
    (shard,) = source.listing(()).shards
    (tmp_path / "p1.jpg").unlink()
    (tmp_path / "p2.jpg").write_bytes(jpeg(60))
    items = list(source.read(shard))
    gone = {item.key: item.reason for item in items if isinstance(item, Reject)}
    assert gone == {"p1.jpg": "missing", "p2.jpg": "missing"}
    assert [item.row for item in items] == list(range(7))


def test_odd_entries_of_a_folder_do_not_stop_a_listing(tmp_path: Path) -> None:
    """A dangling link among pictures costs nothing but itself."""
    (folder_of(tmp_path) / "p9.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert len(records(open_folder(tmp_path))) == 7


def test_a_link_back_to_the_folder_lists_nothing_twice(tmp_path: Path) -> None:
    """Links to folders are not followed."""
    (folder_of(tmp_path) / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(records(open_folder(tmp_path))) == 7


def test_a_file_name_that_is_no_utf8_can_be_packed(tmp_path: Path) -> None:
    """Old archives hold such names; one of them must not lose its shard."""
    folder_of(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(jpeg(9))
    for items in read_all(open_folder(tmp_path)).values():
        assert len(list(unpack_records(pack_records(packable(items))))) == 8


def test_several_folders_are_one_source(tmp_path: Path) -> None:
    """A copy under the same relative path counts once."""
    one, two = folder_of(tmp_path / "one", 2), folder_of(tmp_path / "two", 5)
    assert len(records(open_folder(one, two))) == 5


def test_a_file_name_that_looks_escaped_is_read(tmp_path: Path) -> None:
    """A backslash is an ordinary letter of a name on Linux."""
    (tmp_path / "caf\\xe9.jpg").write_bytes(jpeg(9))
    assert len(records(open_folder(tmp_path))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3,4\n", "metadata.csv"),
        ("", "metadata.csv"),
        ("caption,licence\nx,y\n", "caption, licence.*file_name"),
    ],
    ids=["ragged", "empty", "no file column"],
)
def test_a_metadata_file_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    """One line that names the file and what to do."""
    (folder_of(tmp_path) / "metadata.csv").write_text(content)
    with pytest.raises(BadInputError, match=message) as caught:
        read_all(open_folder(tmp_path))
    assert "\n" not in str(caught.value)


def test_inputs_that_are_no_folder_of_pictures_are_refused(tmp_path: Path) -> None:
    """Missing, a file, or without pictures: each says what was looked for, and what reads the rest."""
    (tmp_path / "x.jpg").write_bytes(jpeg(0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars" / "below").mkdir(parents=True)
    (tmp_path / "tars" / "below" / "00000.tar").write_bytes(b"")
    for name, message in (
        ("nowhere", "does not exist"),
        ("x.jpg", "is a file"),
        ("empty", r"no pictures below .*\.jpeg.*\.webp$"),
        ("tars", "no pictures below"),
    ):
        with pytest.raises(BadInputError, match=message):
            open_folder(tmp_path / name).listing(())
        with pytest.raises(BadInputError, match=message):
            open_folder(tmp_path / name).count()
    message = r"below .*; looked for .*\.jpg.*\.tar files, which --source webdataset reads$"
    with pytest.raises(BadInputError, match=message):
        open_at("folder", tmp_path / "tars")
