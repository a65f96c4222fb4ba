"""Tables of rows: pictures inside Parquet, columns by name, odd values, damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord, LinkRecord, RecordedShard, Reject
from stages.sources.reading.columns import USUAL_NAMES, column_map
from stages.sources.reading.row_files import TABLE_ENDINGS
from tests.conftest import jpeg
from tests.worlds.source_cases import (
    datacomp_rows,
    items_of,
    open_at,
    parquet_of,
    parquet_rows,
    read_all,
    records,
)


def test_pictures_inside_parquet(tmp_path: Path) -> None:
    """LLaVA-ReCap's rows: bytes in a struct, the caption as the second turn of a conversation."""
    path = parquet_of(tmp_path / "a.parquet", parquet_rows(), row_group_size=3)
    found = records(open_at("parquet", path, columns="llava-recap-cc12m", shard_size=2))
    assert list(found) == [f"id{n}" for n in range(7)]
    for n, item in enumerate(found.values()):
        assert (item.data, item.caption) == (jpeg(n, 40, 36), f"caption {n}")
        assert json.loads(item.metadata or "") == {"data_source": "cc12m"}


def test_midjourney_and_own_columns(tmp_path: Path) -> None:
    """Raw bytes in a column, captions by another model; names by option; usual names by themselves."""
    rows = [
        {"id": f"m{n}", "prompt": f"p{n}", "image": jpeg(n), "llava": f"l{n}", "llava_status": "ok"}
        for n in range(3)
    ]
    path = parquet_of(tmp_path / "train_000.parquet", rows)
    preset = records(open_at("parquet", path, columns="midjourney-v6"))
    assert {key: item.caption for key, item in preset.items()} == {
        "m0": "l0",
        "m1": "l1",
        "m2": "l2",
    }
    assert json.loads(preset["m1"].metadata or "") == {"prompt": "p1", "llava_status": "ok"}
    own = records(open_at("parquet", path, columns="caption=prompt,key=llava"))
    assert {key: item.caption for key, item in own.items()} == {"l0": "p0", "l1": "p1", "l2": "p2"}
    usual = records(open_at("parquet", path))
    assert [item.caption for item in usual.values()] == ["p0", "p1", "p2"]
    links = parquet_of(
        tmp_path / "links" / "a.parquet", [{"image_url": "http://a", "caption": "c"}]
    )
    (link,) = items_of(open_at("parquet", links.parent, columns="cc12m"))
    assert isinstance(link, LinkRecord)
    assert (link.url, link.caption, link.key) == ("http://a", "c", "a.parquet/0")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("image", "no PART=COLUMN"),
        ("picture=image", "parts are image, grid"),
        ("image=gone", "'gone'.*it has a, b"),
        (None, "no column is the image or url; the table has a, b"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path: Path, columns: str | None, said: str) -> None:
    path = parquet_of(tmp_path / "a.parquet", [{"a": 1, "b": "x"}])
    with pytest.raises(BadInputError, match=said):
        open_at("parquet", path, columns=columns).listing(())


def test_odd_values_cost_no_other_row(tmp_path: Path) -> None:
    """Nulls everywhere, text that is no UTF-8, infinite numbers, boxes that are none."""
    texts = pa.array([b"fine", b"caf\xe9", None, b"  "], pa.binary()).view(pa.string())
    urls = pa.array(["http://a", " http://b ", None, ""], pa.string())
    scores = pa.array([np.nan, np.inf, None, 0.5], pa.float64())
    boxes = pa.array(
        [[[0.1, 0.1, 0.2, 0.2], [0.1]], [[np.nan, 0, 1, 1], None], None, []],
        pa.list_(pa.list_(pa.float64())),
    )
    names = {"url": urls, "text": texts, "score": scores, "face_bboxes": boxes}
    names |= {"uid": pa.array([None, "u", "v", "w"]), "sha256": pa.array([None, " ABC ", "", "d"])}
    pq.write_table(pa.table(names), tmp_path / "a.parquet")
    first, second, third, fourth = items_of(open_at("datacomp", tmp_path / "a.parquet"))
    assert isinstance(first, LinkRecord)
    assert isinstance(second, LinkRecord)
    assert (first.key, first.caption, first.sha256) == ("a.parquet/0", "fine", None)
    assert first.faces == ((0.1, 0.1, 0.2, 0.2),)
    assert json.loads(first.metadata or "") == {"score": None}
    assert (second.url, second.caption, second.sha256) == ("http://b", "caf�", "abc")
    assert second.faces == ()
    assert [getattr(item, "reason", None) for item in (third, fourth)] == ["no-url", "no-url"]


def test_a_picture_that_is_null_is_a_reject(tmp_path: Path) -> None:
    """With its key; a struct without bytes, as a data set of paths has them, likewise."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": jpeg(1), "path": None}, None, {"bytes": None, "path": "x"}], kind)
    pq.write_table(pa.table({"image": images, "id": ["a", "b", "c"]}), tmp_path / "a.parquet")
    one, two, three = items_of(open_at("parquet", tmp_path / "a.parquet"))
    assert isinstance(one, ImageRecord)
    assert [(r.key, r.reason) for r in (two, three) if isinstance(r, Reject)] == [
        ("b", "no-image"),
        ("c", "no-image"),
    ]


def test_a_truncated_file_is_one_reject_and_a_note(tmp_path: Path) -> None:
    """Parquet has its footer at the end: nothing of such a file can be read; the others can."""
    whole = parquet_of(tmp_path / "t" / "b.parquet", datacomp_rows(3))
    data = parquet_of(tmp_path / "x.parquet", datacomp_rows(5)).read_bytes()
    (tmp_path / "t" / "a.parquet").write_bytes(data[:-20])
    (tmp_path / "t" / "c.parquet").write_bytes(b"")
    source = open_at("datacomp", tmp_path / "t")
    listing = source.listing(())
    assert sum("a.parquet" in note or "c.parquet" in note for note in listing.notes) == 2
    items = items_of(source)
    rejects = {item.key: item.reason for item in items if isinstance(item, Reject)}
    assert rejects == {"a.parquet": "broken-archive", "c.parquet": "broken-archive"}
    assert sum(isinstance(item, LinkRecord) for item in items) == 3
    done = [RecordedShard(shard, len(i)) for shard, i in read_all(source).items()]
    assert not open_at("datacomp", tmp_path / "t", where="uid is null").listing(done).shards[1:]
    assert whole.exists()


@pytest.mark.parametrize("seed", [None, 3])
def test_damage_within_a_file_keeps_what_came_before(tmp_path: Path, seed: int | None) -> None:
    """Row groups before the damage are read, the rest of the shard is one reject."""
    path = parquet_of(
        tmp_path / "a.parquet", datacomp_rows(30), row_group_size=10, compression="none"
    )
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    items = items_of(open_at("datacomp", path, shuffle_seed=seed))
    assert isinstance(items[-1], Reject)
    assert items[-1].reason == "broken-archive"
    assert {item.key for item in items[:-1]} <= {f"{n:032x}" for n in range(10)}
    assert [item.row for item in items] == list(range(len(items)))


def test_a_file_that_moved_keeps_its_shards_and_one_that_is_gone_is_named(tmp_path: Path) -> None:
    """The content decides; every node must see it."""
    path = parquet_of(tmp_path / "here" / "a.parquet", datacomp_rows())
    listed = list(open_at("datacomp", path, shard_size=3).listing(()).shards)
    moved = path.rename(tmp_path / "b.parquet")
    done = [RecordedShard(shard, 3) for shard in listed]
    assert not open_at("datacomp", moved, shard_size=3).listing(done).shards
    assert len(list(open_at("datacomp", moved).read(listed[1]))) == 3
    parquet_of(tmp_path / "other" / "c.parquet", datacomp_rows(2))
    other = open_at("datacomp", tmp_path / "other")
    with pytest.raises(BadInputError, match=r"a\.parquet.*every node"):
        list(other.read(listed[0]))
    assert "3 shards" in " ".join(other.listing([RecordedShard(s) for s in listed]).notes)


def test_only_the_rows_of_a_shard_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard in the middle of a file touches its own row groups, and few rows at a time."""
    path = parquet_of(tmp_path / "a.parquet", parquet_rows(40), row_group_size=5)
    source = open_at("parquet", path, columns="llava-recap-cc12m", shard_size=10)
    shards = source.listing(()).shards
    groups: list[Any] = []
    original = pq.ParquetFile.iter_batches

    def watched(self: Any, batch_size: int, row_groups: Any, columns: Any) -> Any:
        groups.append((batch_size, list(row_groups)))
        return original(self, batch_size=batch_size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert len(list(source.read(shards[2]))) == 10
    assert groups == [(64, [4, 5])]


def test_shards_of_pictures_are_as_heavy_as_memory_allows(tmp_path: Path) -> None:
    """Without --shard-size large pictures make small shards, addresses make large ones."""
    noise = np.random.default_rng(0).bytes(300_000)
    rows = [{"image": noise + bytes([n]), "id": str(n)} for n in range(40)]
    path = parquet_of(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.sources.reading.rows._SHARD_BYTES", 6_000_000)
        listed = open_at("parquet", path).listing(()).shards
    sizes = [int(s.members[0].split()[2]) - int(s.members[0].split()[1]) for s in listed]
    assert sizes == [19, 19, 2]
    links = parquet_of(tmp_path / "m" / "l.parquet", datacomp_rows(10_001))
    assert len(open_at("datacomp", links).listing(()).shards) == 2


def test_an_option_of_another_source_is_refused(tmp_path: Path) -> None:
    """Rather than be ignored."""
    path = parquet_of(tmp_path / "a.parquet", datacomp_rows(1))
    with pytest.raises(BadInputError, match=r"--caption is for --source journeydb"):
        open_at("datacomp", path, caption="task2")
    with pytest.raises(BadInputError, match=r"--scale 'tiny'"):
        open_at("datacomp", path, scale="tiny")
    with pytest.raises(BadInputError, match=r"names no"):
        open_at("parquet", tmp_path / "nothing*").listing(())
    assert set(TABLE_ENDINGS) == {".parquet", ".arrow", ".feather", ".h5", ".hdf5"}
    schema = pa.schema([(name, pa.string()) for name in ("jpg", "TEXT")])
    assert column_map(None, schema, grids=False).caption == "TEXT"
    assert "image" in USUAL_NAMES["image"]
