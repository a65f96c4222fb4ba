"""The webdataset source: which tars, which samples, and archives that are damaged."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrag_runtime.format.errors import ArragError, BadInputError
from schemas.records import (
    REASONS,
    ImageRecord,
    RecordedShard,
    Reject,
    Shard,
    pack_records,
    unpack_records,
)
from schemas.settings.source import SourceSettings
from stages.sources import open_source
from stages.sources.reading.source_kind import Source
from stages.sources.webdataset import WebdatasetLayout
from tests.conftest import encoded, jpeg, picture
from tests.worlds.source_cases import Items, packable, read_all, records


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """A tar of these files in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(start: int, count: int) -> list[tuple[str, bytes]]:
    """The files of samples with a picture and a caption each."""
    numbers = range(start, start + count)
    return [f for n in numbers for f in ((f"s{n}.jpg", jpeg(n)), (f"s{n}.txt", b"caption"))]


def open_tars(
    *inputs: Path | str, shard_size: int | None = None, limit: int | None = None
) -> Source:
    given_paths = tuple(map(str, inputs))
    return open_source(
        SourceSettings(name="webdataset", input=given_paths, limit=limit, shard_size=shard_size)
    )


def items_of(source: Source) -> Items:
    """Everything the source offers, in order."""
    return [item for items in read_all(source).values() for item in items]


def keys_of(source: Source) -> list[str]:
    return [item.key for item in items_of(source)]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of two samples each, one of them a folder deeper."""
    for number, name in enumerate(("00000.tar", "00001.tar", "deep/00002.tar")):
        write_tar(tmp_path / name, samples(2 * number, 2))
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "keys"),
    [
        (["00001.tar"], "23"),
        (["{00000..00001}.tar"], "0123"),
        (["0000*.tar"], "0123"),
        (["**/*.tar"], "012345"),
        (["."], "012345"),
        (["deep", "00000.tar"], "4501"),
        (["deep/00002.tar", "{00000,00001}.tar"], "450123"),
        (["00000.tar", "00000.tar", "0000?.tar"], "0123"),
    ],
)
def test_inputs_name_tars(tars: Path, inputs: list[str], keys: str) -> None:
    """Paths, brace patterns, globs and folders, several of them in their order, copies once."""
    source = open_tars(*(f"{tars}/{given}" for given in inputs))
    assert keys_of(source) == [f"s{number}" for number in keys]


@pytest.mark.parametrize("given_input", ["nothing.tar", "{7..9}.tar", "x*.tar", "empty", "{a.tar"])
def test_an_input_that_names_no_tar_is_refused(tars: Path, given_input: str) -> None:
    """One line with the pattern and what is accepted."""
    (tars / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"--input .*tar") as caught:
        open_tars(tars / given_input).listing(())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 100])
def test_a_limit_counts_over_all_tars(tars: Path, limit: int) -> None:
    """The first N samples of the first tars; tars after them are not opened up."""
    assert keys_of(open_tars(tars, limit=limit)) == [f"s{n}" for n in range(min(limit, 6))]


def test_pictures_and_what_is_said_of_them(tmp_path: Path) -> None:
    """Four suffixes in any case; the text beats the json's caption; other columns are kept."""
    described = {"caption": "json", "url": "http://a", "license": "MIT", "width": 3, "é": [1]}
    files = [
        *(("a.jpg", jpeg(1)), ("a.json", json.dumps(described).encode()), ("a.txt", b" text\n")),
        *(("b.jpeg", jpeg(2)), ("b.json", b'{"caption": "json only", "licence": "CC0"}')),
        *(("c.PNG", encoded(picture(3), "PNG")), ("c.json", b"no json")),
        *(("d.webp", encoded(picture(4), "WEBP")), ("d.txt", b""), ("d.json", b'{"caption": "j"}')),
        *(("e/f.jpg", jpeg(5)), ("e/f.json", b"[1]")),
    ]
    found = records(open_tars(write_tar(tmp_path / "a.tar", files)))
    assert [item.data for item in found.values()] == [
        data for name, data in files if not name.endswith(("json", "txt"))
    ]
    said = {key: (item.caption, item.url, item.licence) for key, item in found.items()}
    assert said == {
        "a": ("text", "http://a", "MIT"),
        "b": ("json only", None, "CC0"),
        "c": (None, None, None),
        "d": ("j", None, None),
        "e/f": (None, None, None),
    }
    kept = {key: json.loads(item.metadata) for key, item in found.items() if item.metadata}
    assert kept == {"a": {"width": 3, "é": [1]}, "c": {"json": "no json"}, "e/f": {"json": [1]}}


def test_a_sample_without_a_picture_is_a_reject(tmp_path: Path) -> None:
    """Its row and address stay, and the others keep their order."""
    files = [*samples(0, 1), ("x.json", b'{"url": "http://x"}'), ("x.gif", b"GIF"), *samples(1, 1)]
    first, second, third = items_of(open_tars(write_tar(tmp_path / "a.tar", files)))
    assert isinstance(second, Reject)
    assert (second.row, second.key, second.reason) == (1, "x", "no-image")
    assert second.url == "http://x"
    assert "gif" in second.detail
    assert (first.key, third.key, third.row) == ("s0", "s1", 2)


@pytest.mark.parametrize(("shard_size", "shards"), [(None, 1), (2, 4), (3, 3), (7, 1), (8, 1)])
def test_a_long_tar_is_listed_range_by_range(
    tmp_path: Path, shard_size: int | None, shards: int
) -> None:
    """Every sample once; the next range is offered only when the one before proved full."""
    source = open_tars(write_tar(tmp_path / "a.tar", samples(0, 7)), shard_size=shard_size)
    seen: list[str] = []
    recorded: list[RecordedShard] = []
    while listed := source.listing(recorded).shards:
        (shard,) = listed
        assert list(source.listing([*recorded, RecordedShard(shard)]).shards) == [shard]
        items = list(source.read(shard))
        seen += [item.key for item in items]
        recorded.append(RecordedShard(shard, len(items)))
    assert seen == [f"s{n}" for n in range(7)]
    assert len([r for r in recorded if r.inputs]) == shards
    assert len({r.shard.id for r in recorded}) == len(recorded)


@pytest.mark.parametrize("shard_size", [2, 3, 4, 5, 100])
def test_a_truncated_tar_gives_what_came_before_and_one_reject(
    tmp_path: Path, shard_size: int
) -> None:
    """All complete samples before the damage are read, and the damage is reported once."""
    path = write_tar(tmp_path / "a.tar", samples(0, 6))
    with tarfile.open(path) as archive:
        cut = archive.getmember("s4.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    items = items_of(open_tars(path, shard_size=shard_size))
    pictures = [item.key for item in items if isinstance(item, ImageRecord)]
    broken = [item for item in items if isinstance(item, Reject)]
    assert [item.reason for item in broken] == ["broken-archive"]
    assert "a.tar" in broken[0].key
    assert pictures == ["s0", "s1", "s2", "s3"]


def test_a_tar_cut_within_a_header_is_reported(tmp_path: Path) -> None:
    """Python's reader ends there without a word; the samples after it would be lost unseen."""
    path = write_tar(tmp_path / "a.tar", samples(0, 6))
    with tarfile.open(path) as archive:
        cut = archive.getmember("s4.jpg").offset + 100
    path.write_bytes(path.read_bytes()[:cut])
    *complete, broken = items_of(open_tars(path))
    assert [item.key for item in complete] == ["s0", "s1", "s2", "s3"]
    assert isinstance(broken, Reject)
    assert broken.reason == "broken-archive"


@pytest.mark.parametrize("limit", [None, 3])
def test_a_header_that_makes_no_sense_is_a_reject(tmp_path: Path, limit: int | None) -> None:
    """Extended headers hold numbers that Python's reader trusts; a wrong one does not escape."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in samples(0, 1):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("s1.jpg"))
        member.pax_headers = {"GNU.sparse.map": "no,numbers"}
        archive.addfile(member, io.BytesIO(data))
    items = items_of(open_tars(tmp_path / "a.tar", limit=limit))
    assert items[0].key == "s0"
    assert {item.reason for item in items if isinstance(item, Reject)} <= set(REASONS)


@pytest.mark.parametrize(
    "content",
    [b"", b"no tar at all" * 1000, gzip.compress(bytes(20480))[:12], b"\x1f\x8b\x08" + bytes(99)],
    ids=["empty", "text", "cut gzip", "broken gzip"],
)
def test_what_is_no_tar_is_one_reject(tmp_path: Path, content: bytes) -> None:
    """A wrong file among good tars costs nothing but itself."""
    write_tar(tmp_path / "b.tar", samples(0, 2))
    (tmp_path / "a.tar").write_bytes(content)
    broken, *rest = items_of(open_tars(tmp_path))
    assert isinstance(broken, Reject)
    assert broken.reason == "broken-archive"
    assert [item.key for item in rest] == ["s0", "s1"]


def test_the_same_name_twice_costs_no_other_sample(tmp_path: Path) -> None:
    """A sample that holds two files of one name is damaged; those after it are not."""
    files = [*samples(0, 1), ("x.jpg", jpeg(7)), ("x.jpg", jpeg(8)), *samples(1, 2)]
    found = records(open_tars(write_tar(tmp_path / "a.tar", files)))
    assert {"s0", "s1", "s2"} <= set(found)


@pytest.mark.parametrize(
    "files",
    [
        [("x.jpg", jpeg(1)), ("x.json", b'{"caption": "\\ud800", "a": "\\udfff"}')],
        [("caf\udce9.jpg", jpeg(1))],
    ],
    ids=["caption", "name"],
)
def test_text_that_is_no_unicode_can_be_packed(
    tmp_path: Path, files: list[tuple[str, bytes]]
) -> None:
    """Half a surrogate pair in a json, or a name in an old encoding, must not lose its shard."""
    items = items_of(open_tars(write_tar(tmp_path / "a.tar", [*files, *samples(0, 1)])))
    assert len(list(unpack_records(pack_records(packable(items))))) == 2


def test_a_tar_whose_name_is_no_utf8_can_be_recorded(tmp_path: Path) -> None:
    """The ledger keeps a shard's members as text, so they must be text."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar"))
    source = open_tars(write_tar(odd, samples(0, 1)))
    (shard,) = source.listing(()).shards
    stored = pa.array(shard.members, pa.string()).to_pylist()
    assert [item.key for item in source.read(Shard(shard.source, shard.id, tuple(stored)))] == [
        "s0"
    ]


def test_a_tar_that_moved_keeps_its_shards(tmp_path: Path) -> None:
    """A shard follows the tar's content; one that is gone is noted, and refused when read."""
    path = write_tar(tmp_path / "here" / "a.tar", samples(0, 3))
    source = open_tars(path, shard_size=2)
    (shard,) = source.listing(()).shards
    moved = path.rename(tmp_path / "a.tar")
    assert list(open_tars(moved, shard_size=2).listing(()).shards) == [shard]
    other = open_tars(write_tar(tmp_path / "b.tar", samples(5, 1)))
    listing = other.listing([RecordedShard(shard)])
    assert shard not in listing.shards
    assert "1 shard" in " ".join(listing.notes)
    with pytest.raises(ArragError, match=r"a\.tar"):
        list(other.read(shard))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6)
)
def test_a_damaged_tar_never_raises(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """Whatever bytes changed: rows count from 0, and every reject has a known reason."""
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    data = bytearray(path.read_bytes())
    for number, (at, change) in enumerate(flips):
        data[at % (len(data) if number % 2 else 300)] ^= change
    path.write_bytes(data)
    items = items_of(open_tars(path))
    assert len(items_of(open_tars(path, limit=2))) <= 2
    assert [item.row for item in items] == list(range(len(items)))
    assert {item.reason for item in items if isinstance(item, Reject)} <= set(REASONS)


def test_keys_are_webdatasets_own(tmp_path: Path) -> None:
    """Names split as webdataset splits them, whatever dots and folders they have."""
    from webdataset.tariterators import base_plus_ext

    names = [
        "a.jpg",
        "d/a.b.jpg",
        "d.e/f.png",
        ".hidden.jpg",
        "d/.hid.jpg",
        "none",
        "x..jpg",
        "a/b/c.d",
    ]
    for name in names:
        member = tarfile.TarInfo(name)
        key, extension = WebdatasetLayout().key(member)
        assert (key, extension or None) == base_plus_ext(name), name


def test_what_datacomps_tools_wrote_is_kept_and_can_be_a_condition(tmp_path: Path) -> None:
    """The json of img2dataset with DataComp's columns: all of it stays, --where sees all of it."""
    files = []
    for n in range(4):
        described = {
            "uid": f"{n:032x}",
            "sha256": f"{n:064x}",
            "caption": f"c{n}",
            "url": f"http://h/{n}",
            "key": f"{n:09}",
            "status": "success",
            "error_message": None,
            "width": 100 * n,
            "height": 90,
            "original_width": 300,
            "original_height": 200,
            "clip_l14_similarity_score": n / 10 if n else None,
            "exif": "{}",
        }
        files += [(f"{n:09}.jpg", jpeg(n)), (f"{n:09}.txt", f"c{n}".encode())]
        files.append((f"{n:09}.json", json.dumps(described).encode()))
    path = write_tar(tmp_path / "00000.tar", files)
    found = records(open_tars(path))
    kept = json.loads(found["000000003"].metadata or "")
    assert (kept["uid"], kept["sha256"]) == (f"{3:032x}", f"{3:064x}")
    assert (kept["width"], kept["clip_l14_similarity_score"]) == (300, 0.3)
    assert set(described) - set(kept) == {"caption", "url"}
    where = "clip_l14_similarity_score >= 0.2 or url like '%/0'"
    some = open_source(SourceSettings(name="webdataset", input=(str(path),), where=where))
    items = items_of(some)
    assert [item.key for item in items] == ["000000000", "000000002", "000000003"]
    assert [item.row for item in items] == [0, 1, 2]
    wrong = open_source(SourceSettings(name="webdataset", input=(str(path),), where="score > 1"))
    with pytest.raises(BadInputError, match=r"'score'.*uid, sha256, caption"):
        wrong.listing(())
