"""One contract for all sources, and what the bundled pictures promise."""

import errno
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from arrag_runtime.format.errors import BadInputError
from schemas.records import MAX_ROWS_PER_SHARD, RecordedShard, pack_records, unpack_records
from schemas.settings.source import SourceSettings
from stages.sources import SOURCES, open_source
from stages.sources.reading.files import SourceFile, UnreachableError
from stages.sources.reading.fingerprint import fingerprint, make_shard
from stages.sources.sample import PICTURES
from tests.worlds.source_cases import (
    CASES,
    OPTIONS,
    items_of,
    open_at,
    open_case,
    open_folder,
    packable,
    read_all,
    records,
    rowless,
    tar_of,
)


def test_every_source_has_a_case() -> None:
    """A new source joins the contract below; `links` is one that other tests add for themselves."""
    assert set(CASES) == set(SOURCES) - {"links"}
    with pytest.raises(BadInputError, match=r"'imagenet'.*sample, folder, webdataset"):
        open_source(SourceSettings(name="imagenet"))


@pytest.mark.parametrize("name", CASES)
def test_the_contract_of_a_source(name: str, tmp_path: Path) -> None:
    """Rows count from 0; reading again gives the same; ids come from content; packing keeps all."""
    first, again = (open_case(name, tmp_path, shard_size=3) for _ in range(2))
    found = read_all(first)
    assert found == read_all(again)
    assert len(found) > 1
    for shard, items in found.items():
        assert list(first.read(shard)) == items
        assert [item.row for item in items] == list(range(len(items)))
        assert len(items) <= 3
        assert re.fullmatch("[0-9a-f]{16}", shard.id)
        assert shard.source == name
        assert list(unpack_records(pack_records(packable(items)))) == packable(items)
    assert len({shard.id for shard in found}) == len(found)
    keys = [item.key for items in found.values() for item in items]
    assert len(set(keys)) == len(keys) == (48 if name == "sample" else 7)


@pytest.mark.parametrize("name", CASES)
def test_what_is_done_is_not_listed_and_what_is_planned_comes_back(
    name: str, tmp_path: Path
) -> None:
    """A shard planned earlier is offered again as it was, whatever the shard size is now."""
    source = open_case(name, tmp_path, shard_size=3)
    everything = read_all(source)
    done = tuple(RecordedShard(shard, len(items)) for shard, items in everything.items())
    assert not source.listing(done).shards
    planned = tuple(source.listing(()).shards)
    other = open_case(name, tmp_path, shard_size=5)
    assert (
        tuple(other.listing([RecordedShard(s) for s in planned]).shards)[: len(planned)] == planned
    )


class Ill(io.FileIO):
    """A file on a disk that fails from its second half on."""

    def readinto(self, buffer: Any) -> int | None:
        if self.tell() >= Path(str(self.name)).stat().st_size // 2:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(memoryview(buffer)[:64])

    def readall(self) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("name", ["webdataset", "cc12m", "datacomp", "journeydb", "parquet"])
@pytest.mark.parametrize("when", ["listing", "reading"])
def test_a_disk_that_fails_costs_no_input(
    name: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no damage of the file: the shard fails, and all is there once the disk is well."""
    given = CASES[name](tmp_path)
    options = OPTIONS.get(name, {})
    expected = items_of(open_at(name, *given, **options))
    shards = open_at(name, *given, **options).listing(()).shards
    with monkeypatch.context() as patch:
        patch.setattr(SourceFile, "open", lambda file: io.BufferedReader(Ill(file.location), 64))
        # A tar is not looked into before it is read, but for a limit.
        ill = open_at(name, *given, **options | {"limit": 6})
        with pytest.raises(UnreachableError, match=r"cannot read .*Input/output error"):
            list(ill.read(shards[0]) if when == "reading" else ill.listing(()).shards)
    assert items_of(open_at(name, *given, **options)) == expected


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("limit", [1, 4])
def test_a_limit_takes_the_first_inputs(name: str, limit: int, tmp_path: Path) -> None:
    """--limit N gives the first N inputs, over all shards together."""
    whole = items_of(open_case(name, tmp_path))
    limited = items_of(open_case(name, tmp_path, shard_size=3, limit=limit))
    assert list(map(rowless, limited)) == list(map(rowless, whole[:limit]))


@pytest.mark.parametrize("name", CASES)
def test_a_shuffle_is_the_same_every_time_and_loses_nothing(name: str, tmp_path: Path) -> None:
    """--shuffle-seed orders shards and rows; the seed decides, and is part of the shard."""
    whole = {rowless(item) for item in items_of(open_case(name, tmp_path, shard_size=3))}
    orders = []
    for seed in (1, 1, 2, 3):
        found = read_all(open_case(name, tmp_path, shard_size=3, shuffle_seed=seed))
        items = [rowless(item) for items in found.values() for item in items]
        assert len(items) == len(whole)
        assert set(items) == whole
        for shard, rows in found.items():
            assert [item.row for item in rows] == list(range(len(rows)))
            again = open_case(name, tmp_path).read(shard)
            assert list(again) == rows
        orders.append(items)
    assert orders[0] == orders[1]
    assert orders[1] != orders[2] or orders[2] != orders[3]


@pytest.mark.parametrize("name", CASES)
def test_an_input_is_counted_before_anything_runs(name: str, tmp_path: Path) -> None:
    """Small inputs are counted exactly; a limit is heeded."""
    source = open_case(name, tmp_path)
    assert source.count().inputs == len(items_of(source))
    assert source.count().exact
    assert open_case(name, tmp_path, limit=2).count().inputs == 2


@pytest.mark.parametrize("name", sorted({*CASES} - {"sample"}))
def test_the_input_has_to_be_given_and_the_size_to_fit(name: str, tmp_path: Path) -> None:
    """Missing --input, and shard sizes that the ids of a shard's rows could not count."""
    with pytest.raises(BadInputError, match="--input"):
        open_source(SourceSettings(name=name))
    for size in (-1, MAX_ROWS_PER_SHARD + 1):
        with pytest.raises(BadInputError, match=f"--shard-size (is )?{size}"):
            open_case(name, tmp_path, shard_size=size)


def test_ids_stay_what_they_are_in_every_database(tmp_path: Path) -> None:
    """Ledgers hold these: another way to make them would read every picture again as new."""
    (tmp_path / "file").write_bytes(bytes(range(256)) * 400)
    assert fingerprint(tmp_path / "file") == "794ae541ebd90695"
    assert make_shard("folder", ["0123456789abcdef a.jpg", "b"]).id == "8cd1ada15b16bc77"


def test_a_picture_is_the_same_through_every_source(tmp_path: Path) -> None:
    """Bytes, and hence the picture's hash and tokens, do not depend on the way in."""
    names = sorted(path.name for path in PICTURES.glob("*.jpg"))[:3]
    for name in names:
        shutil.copy(PICTURES / name, tmp_path / name)
    tar_of(tmp_path, tmp_path / "a.tar")
    tars = open_source(SourceSettings(name="webdataset", input=(str(tmp_path / "a.tar"),)))
    sample = records(open_source(SourceSettings(name="sample")))
    copies, archived = records(open_folder(tmp_path)), records(tars)
    for name in names:
        data = (PICTURES / name).read_bytes()
        assert sample[name].data == copies[name].data == archived[Path(name).stem].data == data


def test_the_bundled_pictures_are_described_small_and_free() -> None:
    """Caption, address and free licence for each; 2.5 MB and 384 pixels at most; attributed."""
    found = records(open_source(SourceSettings(name="sample")))
    attribution = (PICTURES / "ATTRIBUTION.md").read_text()
    assert {path.name for path in PICTURES.iterdir()} == {
        *found,
        "ATTRIBUTION.md",
        "metadata.jsonl",
    }
    for key, item in found.items():
        assert item.caption
        assert (item.url or "").startswith("https://")
        assert item.licence in {"CC0-1.0", "MIT", "CC-BY-4.0"}
        assert f"`{key}`" in attribution
        with Image.open(PICTURES / key) as image:
            assert min(image.size) <= 384
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) <= 2_500_000
    with pytest.raises(BadInputError, match=r"/mine.*--source folder"):
        open_source(SourceSettings(name="sample", input=("/mine",)))
