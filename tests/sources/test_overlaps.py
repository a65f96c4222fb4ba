"""The rule of `reading.row_ranges`: whatever options follow each other, no row comes twice.

Builds are simulated: everything that a listing offers is read and recorded. The oracle is a list of
rows and plain Python conditions.
"""

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from schemas.records import ImageRecord, LinkRecord, RecordedShard
from stages.sources.reading.source_kind import Source
from tests.conftest import jpeg
from tests.worlds.source_cases import (
    datacomp_rows,
    folder_of,
    journeydb_of,
    open_at,
    parquet_of,
    tar_of,
    tgz_of,
)

CAPTIONS = ["a", "b", None, "ab", "c", "a", None, "b", "abc", "c", "ba", "c", "a"]
CONDITIONS: dict[str | None, Callable[[str | None], bool]] = {
    None: lambda _text: True,
    "caption like '%a%'": lambda text: text is not None and "a" in text,
    "caption = 'b' or caption is null": lambda text: text in ("b", None),
    "not (caption = 'c')": lambda text: text is not None and text != "c",
}


def rows_with_captions() -> list[dict[str, Any]]:
    rows = zip(datacomp_rows(len(CAPTIONS)), CAPTIONS, strict=True)
    return [row | {"text": caption} for row, caption in rows]


def a_table(tmp: Path) -> tuple[str, str]:
    """Two Parquet files, the second with several row groups."""
    rows = [row | {"caption": row["text"]} for row in rows_with_captions()]
    parquet_of(tmp / "t" / "a.parquet", rows[:5], row_group_size=100)
    parquet_of(tmp / "t" / "b.parquet", rows[5:], row_group_size=3)
    return "parquet", str(tmp / "t")


def a_list(tmp: Path) -> tuple[str, str]:
    lines = [f"http://h/{n}\t{caption or ''}" for n, caption in enumerate(CAPTIONS)]
    (tmp / "l.tsv").write_text("\n".join(lines) + "\n")
    return "cc12m", str(tmp / "l.tsv")


def two_lists(tmp: Path) -> tuple[str, str]:
    lines = Path(a_list(tmp)[1]).read_text().splitlines(keepends=True)
    (tmp / "lists").mkdir()
    (tmp / "lists" / "a.tsv").write_text("".join(lines[:4]))
    (tmp / "lists" / "b.tsv").write_text("".join(lines[4:]))
    return "cc12m", str(tmp / "lists")


def a_tar(tmp: Path) -> tuple[str, str]:
    """Tars, each sample with a json that holds its caption."""
    for name, numbers in (("a", range(0, 6)), ("b", range(6, len(CAPTIONS)))):
        folder = tmp / name
        folder.mkdir()
        for n in numbers:
            (folder / f"{n:02}.jpg").write_bytes(jpeg(n, 40, 36))
            (folder / f"{n:02}.json").write_text(json.dumps({"caption": CAPTIONS[n]}))
        (tmp / "tars").mkdir(exist_ok=True)
        tar_of(folder, tmp / "tars" / f"{name}.tar")
    return "webdataset", str(tmp / "tars")


def a_folder(tmp: Path) -> tuple[str, str]:
    folder = tmp / "f"
    folder.mkdir()
    lines = []
    for n, caption in enumerate(CAPTIONS):
        (folder / f"{n:02}.jpg").write_bytes(jpeg(n, 40, 36))
        lines.append(json.dumps({"file_name": f"{n:02}.jpg", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return "folder", str(folder)


KINDS = {"parquet": a_table, "cc12m": two_lists, "webdataset": a_tar, "folder": a_folder}


@pytest.fixture(scope="module", params=KINDS)
def source_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Source]:
    """Opens the same thirteen inputs through one of the sources, with these options."""
    name, where = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    return lambda **options: open_at(name, where, **options)


def place(item: Any) -> int:
    """Which of the thirteen an item is."""
    if isinstance(item, LinkRecord):
        return int(item.url.rsplit("/", 1)[-1].removesuffix(".jpg"))
    assert isinstance(item, ImageRecord)
    return next(n for n in range(len(CAPTIONS)) if jpeg(n, 40, 36) == item.data)


option_sets = st.fixed_dictionaries(
    {
        "where": st.sampled_from(list(CONDITIONS)),
        "limit": st.sampled_from([None, 1, 3, 6, 20]),
        "shard_size": st.sampled_from([1, 3, 4, 50]),
        "shuffle_seed": st.sampled_from([None, None, 5, 6]),
    }
)


PLAIN: dict[str, Any] = {"where": None, "limit": None, "shard_size": 3, "shuffle_seed": None}


@example(builds=[PLAIN | {"shuffle_seed": 5, "limit": 6}, PLAIN])
@example(builds=[PLAIN | {"limit": 6}, PLAIN | {"limit": 6, "shard_size": 4}])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(builds=st.lists(option_sets, min_size=2, max_size=4))
def test_no_row_is_taken_twice_and_none_that_is_wanted_is_missed(
    source_of: Callable[..., Source], builds: list[dict[str, Any]]
) -> None:
    """After each build the rows in the database are those wanted so far, each once."""
    recorded: list[RecordedShard] = []
    held: list[int] = []
    for options in builds:
        wanted = [n for n, c in enumerate(CAPTIONS) if CONDITIONS[options["where"]](c)]
        before = set(held)
        while fresh := source_of(**options).listing(recorded).shards:
            for shard in fresh:
                items = list(source_of(**options).read(shard))
                assert [item.row for item in items] == list(range(len(items)))
                held += [place(item) for item in items]
                recorded.append(RecordedShard(shard, len(items)))
        assert len({r.shard.id for r in recorded}) == len(recorded)
        assert len(held) == len(set(held)), "a row came twice"
        added = set(held) - before
        assert added <= set(wanted)
        limit = options["limit"]
        if limit is None:
            assert set(wanted) <= set(held)
        elif options["shuffle_seed"] is None:
            assert set(held) == before | set(wanted[:limit])
        else:
            assert len(added) <= limit
            anew = source_of(**options)
            chosen = {place(i) for s in anew.listing(()).shards for i in anew.read(s)}
            if len(chosen) == min(limit, len(wanted)):
                assert set(held) == before | chosen


def test_the_same_options_have_nothing_more_to_do(source_of: Callable[..., Source]) -> None:
    """A build that is given again after it was done lists nothing, under every condition."""
    for where, limit, seed in itertools.product(CONDITIONS, (None, 4), (None, 9)):
        options = {"where": where, "limit": limit, "shuffle_seed": seed, "shard_size": 4}
        recorded: list[RecordedShard] = []
        while fresh := source_of(**options).listing(recorded).shards:
            for shard in fresh:
                read = len(list(source_of(**options).read(shard)))
                recorded.append(RecordedShard(shard, read))
        assert not source_of(**options).listing(recorded).shards


def test_a_shard_says_which_rows_it_takes(tmp_path: Path) -> None:
    """The ledger's members hold range, name, condition, what is left out, and the order."""
    name, table = a_table(tmp_path)
    first = open_at(name, table, where="caption  like '%a%'", limit=2)
    (one,) = first.listing(()).shards
    assert one.members[0].endswith(" 0 4 a.parquet")
    assert one.members[1:] == ("where (caption like '%a%')",)
    rest = open_at(name, table, where="caption is not null", shuffle_seed=7)
    listed = rest.listing([RecordedShard(one, 2)]).shards
    conditions = {shard.members[0].split(" ", 1)[1]: shard.members[1:] for shard in listed}
    assert conditions["0 4 a.parquet"] == (
        "where not (caption is null)",
        "without (caption like '%a%')",
        "shuffle 7",
    )
    assert conditions["4 5 a.parquet"] == ("where not (caption is null)", "shuffle 7")


def test_journeydb_filters_by_what_its_annotations_say(tmp_path: Path) -> None:
    """Conditions reach into structs; a picture without annotation has nulls."""
    root = journeydb_of(tmp_path / "j")
    tgz_of(root / "data/train/imgs/002.tgz", [("./002/odd.jpg", jpeg(99, 40, 36))])
    source = open_at("journeydb", root, where="Task2.Caption like '%001%' or prompt is null")
    items = [item for shard in source.listing(()).shards for item in source.read(shard)]
    keys = ["001/0-x.jpg", "001/1-x.jpg", "001/2-x.jpg", "002/odd.jpg"]
    assert [item.key for item in items] == keys


def test_a_packed_or_grown_list_keeps_what_was_recorded(tmp_path: Path) -> None:
    """Lines are known by content and place: gzip, a copy, and more lines at the end are not new."""
    name, path = a_list(tmp_path)
    source = open_at(name, path, shard_size=4)
    done = [RecordedShard(s, 4) for s in source.listing(()).shards]
    text = Path(path).read_bytes()
    packed = tmp_path / "packed.tsv.gz"
    packed.write_bytes(gzip.compress(text))
    assert not open_at(name, packed, shard_size=4).listing(done).shards
    grown = tmp_path / "grown.tsv"
    grown.write_bytes(text + b"http://h/13\tnew\nhttp://h/14\tnewer")
    for size in (4, 5, 100):
        listed = open_at(name, grown, shard_size=size).listing(done).shards
        found = [i for s in listed for i in open_at(name, grown).read(s)]
        assert [place(item) for item in found] == [13, 14]
    planned = [RecordedShard(r.shard, None if n == 1 else 4) for n, r in enumerate(done)]
    (again,) = open_at(name, packed, shard_size=4).listing(planned).shards
    assert again.id == done[1].shard.id
    assert [place(i) for i in open_at(name, packed).read(again)] == [4, 5, 6, 7]


def test_a_grown_list_under_a_limit_keeps_what_was_recorded(tmp_path: Path) -> None:
    """Also where the limit falls into a shard of the shorter list."""
    name, path = a_list(tmp_path)
    done = [RecordedShard(s, 5) for s in open_at(name, path, shard_size=5).listing(()).shards]
    grown = tmp_path / "grown.tsv"
    grown.write_bytes(Path(path).read_bytes() + b"http://h/13\tnew\nhttp://h/14\tnewer")
    for limit in range(1, 14):
        assert not open_at(name, grown, shard_size=5, limit=limit).listing(done).shards
    listed = open_at(name, grown, shard_size=5, limit=14).listing(done).shards
    assert [place(item) for s in listed for item in open_at(name, grown).read(s)] == [13]


def test_copies_of_an_input_count_once(tmp_path: Path) -> None:
    """The same file given twice, or under another name, gives its rows once."""
    folder_of(tmp_path / "p")
    for name, path in (a_table(tmp_path), a_list(tmp_path)):
        once = open_at(name, path)
        listed = [shard.id for shard in once.listing(()).shards]
        assert [shard.id for shard in open_at(name, path, path).listing(()).shards] == listed
