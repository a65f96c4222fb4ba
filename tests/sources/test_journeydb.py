"""The journeydb source: archives as streams, captions from annotations that lie beside them."""

import json
from pathlib import Path

import pytest

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord, Reject
from schemas.settings.source import SourceSettings
from stages.sources import locate_source
from tests.conftest import jpeg
from tests.worlds.source_cases import items_of, journeydb_of, open_at, read_all, records, tgz_of

ANNOTATIONS = "data/train/train_anno_realease_repath.jsonl.tgz"


def test_pictures_with_their_captions(tmp_path: Path) -> None:
    """By path, in the order of the archives; prompt and tasks stay as metadata, questions do not."""
    root = journeydb_of(tmp_path)
    found = records(open_at("journeydb", root))
    assert list(found) == [f"000/{n}-x.jpg" for n in range(4)] + [
        f"001/{n}-x.jpg" for n in range(3)
    ]
    item = found["001/2-x.jpg"]
    assert item.data == jpeg(12, 40, 36)
    assert item.caption == "a picture 001/2-x.jpg"
    assert json.loads(item.metadata or "") == {
        "prompt": "001/2-x.jpg --v 5",
        "Task1": {"Style": ["oil"]},
        "Task2": {"Caption": "a picture 001/2-x.jpg"},
    }
    prompted = records(open_at("journeydb", root, caption="prompt"))
    assert prompted["000/0-x.jpg"].caption == "000/0-x.jpg --v 5"
    with pytest.raises(BadInputError, match=r"--caption 'task3'; choose one of task2, prompt"):
        open_at("journeydb", root, caption="task3")


@pytest.mark.parametrize("given", ["", "data/train", "data/train/imgs/*.tgz", "data/train/imgs"])
def test_an_input_is_a_folder_or_files(tmp_path: Path, given: str) -> None:
    """The data set's folder or a part of it; where annotations are not below it, name them too."""
    root = journeydb_of(tmp_path)
    inputs = [f"{root}/{given}"]
    if "imgs" in given:
        without = open_at("journeydb", *inputs)
        assert "no annotations" in " ".join(without.listing(()).notes)
        assert {item.caption for item in records(without).values()} == {None}
        inputs.append(f"{root}/{ANNOTATIONS}")
    found = records(open_at("journeydb", *inputs))
    assert len(found) == 7
    assert all(item.caption for item in found.values())


def test_annotations_that_are_odd_cost_no_picture(tmp_path: Path) -> None:
    """Missing, broken and foreign lines, a Task2 without caption, a plain jsonl; hidden files."""
    lines = [
        b'{"img_path": "./000/a.jpg", "prompt": "caf\xe9", "Task2": {"Caption": " A "}}',
        b'{"img_path": "./000/b.jpg", "prompt": "b", "Task2": {}}',
        b'{"img_path": "./000/c.jpg", "prompt": null, "Task2": null}',
        b'{"img_path": "./000/d.jpg", broken',
        b"",
        b'["./000/e.jpg"]',
        b'{"img_path":"000/f.jpg","Task2":{"Caption":"F"}}',
        b'{"img_path": "./999/z.jpg", "prompt": "elsewhere"}',
    ]
    (tmp_path / "train_anno.jsonl").write_bytes(b"\r\n".join(lines))
    files = [(f"000/{name}.jpg", jpeg(n)) for n, name in enumerate("abcdef")]
    tgz_of(tmp_path / "000.tgz", [*files, ("000/._a.jpg", b"mac"), ("000/readme.txt", b"x")])
    found = records(open_at("journeydb", tmp_path))
    captions = {key[-5]: item.caption for key, item in found.items()}
    assert captions == {"a": "A", "b": None, "c": None, "d": None, "e": None, "f": "F"}
    assert json.loads(found["000/a.jpg"].metadata or "")["prompt"] == "caf�"
    assert found["000/d.jpg"].metadata is None


@pytest.mark.parametrize("part", [0.4, 0.8])
def test_a_truncated_archive_gives_what_came_before_and_one_reject(
    tmp_path: Path, part: float
) -> None:
    """The other archives are not touched by it."""
    root = journeydb_of(tmp_path, counts=(9, 2))
    path = root / "data/train/imgs/000.tgz"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    items = items_of(open_at("journeydb", root, shard_size=4))
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [(item.key, item.reason) for item in rejects] == [
        ("data/train/imgs/000.tgz", "broken-archive")
    ]
    pictures = [item for item in items if isinstance(item, ImageRecord)]
    first = [item for item in pictures if item.key.startswith("000/")]
    assert 0 < len(first) < 9
    assert all(item.data == jpeg(n, 40, 36) for n, item in enumerate(first))
    assert sum(item.key.startswith("001/") for item in pictures) == 2


def test_truncated_annotations_describe_what_they_reach(tmp_path: Path) -> None:
    """Pictures are the inputs: those without a line come without a caption."""
    root = journeydb_of(tmp_path, counts=(150,))
    path = root / ANNOTATIONS
    path.write_bytes(path.read_bytes()[:-60])
    found = records(open_at("journeydb", root))
    described = [key for key, item in found.items() if item.caption]
    assert len(found) == 150
    assert 0 < len(described) < 150


def test_an_archive_is_read_in_ranges_without_unpacking(tmp_path: Path) -> None:
    """A large archive becomes several shards, each its own range; nothing is written anywhere."""
    root = journeydb_of(tmp_path, counts=(7,))
    before = sorted(tmp_path.rglob("*"))
    found = read_all(open_at("journeydb", root, shard_size=3))
    assert [len(items) for items in found.values()] == [3, 3, 1]
    assert sorted(tmp_path.rglob("*")) == before


def test_without_an_input_it_is_the_publishers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set on the hub, at the commit that main stands for."""
    monkeypatch.setattr(
        "stages.sources.reading.files._pin", lambda address, _revision: f"{address}@pinned"
    )
    located = locate_source(SourceSettings(name="journeydb"))
    assert located.input == ("hf://datasets/JourneyDB/JourneyDB/data/train@pinned",)
    located = locate_source(SourceSettings(name="datacomp", scale="large"))
    assert located.input == ("hf://datasets/mlfoundations/datacomp_large@pinned",)
