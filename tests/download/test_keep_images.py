"""Kept downloads: tars that the webdataset source reads back as they were."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.records import Attempt, ImageRecord, Reject, Shard
from schemas.settings.source import SourceSettings
from stages.download.keep_images import keep_images
from stages.sources import open_source
from tests.conftest import jpeg
from tests.worlds.source_cases import records

SHARD = Shard("links", "00c0ffee00c0ffee", ())
ITEMS: list[ImageRecord | Reject] = [
    ImageRecord(0, "a/b.c d", jpeg(0), "caption\nof two lines", "http://a", "CC0", '{"uid": "é"}'),
    Reject(1, "x", "download", "dns", "no such host"),
    ImageRecord(2, "a/b.c d", jpeg(2), None, "http://b", faces=((0.0, 0.25, 0.5, 1.0),)),
    ImageRecord(7, "../../../etc/x", jpeg(7), "", "http://c", metadata="[1]"),
]


def test_tars_are_read_back_as_they_were(tmp_path: Path) -> None:
    """Captions, addresses, licences, columns, and faces that are still to be blurred."""
    assert list(keep_images(iter(ITEMS), tmp_path / "kept", Attempt(SHARD))) == ITEMS
    (tar,) = (tmp_path / "kept").iterdir()
    assert tar.name == "00c0ffee00c0ffee.tar"
    found = records(open_source(SourceSettings(name="webdataset", input=(str(tar),))))
    assert list(found) == ["00000", "00002", "00007"]
    for item in (i for i in ITEMS if isinstance(i, ImageRecord)):
        back = found[f"{item.row:05}"]
        assert (back.data, back.url, back.licence) == (item.data, item.url, item.licence)
        assert (back.caption, back.faces) == (item.caption or None, item.faces)
        assert json.loads(back.metadata or "")["key"] == item.key
    assert json.loads(found["00000"].metadata or "")["uid"] == "é"
    assert json.loads(found["00007"].metadata or "")["metadata"] == [1]


def test_a_second_attempt_has_a_tar_of_its_own(tmp_path: Path) -> None:
    for attempt in (Attempt(SHARD), Attempt(SHARD, 2, (1,))):
        list(keep_images(iter(ITEMS[:1]), tmp_path, attempt))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00c0ffee00c0ffee-2.tar",
        "00c0ffee00c0ffee.tar",
    ]


def test_a_tar_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    """What a killed attempt left is cleared away by the next."""
    (tmp_path / ".00c0ffee00c0ffee.tar.1").write_bytes(b"half")

    def failing() -> Iterator[ImageRecord | Reject]:
        yield ITEMS[0]
        raise OSError("the disk is full")

    passing = keep_images(failing(), tmp_path, Attempt(SHARD))
    next(passing)
    assert [p.name for p in tmp_path.iterdir()] == [f".00c0ffee00c0ffee.tar.{os.getpid()}"]
    with pytest.raises(OSError, match="full"):
        next(passing)
    assert list(tmp_path.iterdir()) == []
    list(keep_images(iter(ITEMS), tmp_path, Attempt(SHARD)))
    with tarfile.open(tmp_path / "00c0ffee00c0ffee.tar") as archive:
        assert len(archive.getnames()) == 8


@pytest.mark.parametrize("boxes", [1, "x", [1], [[1, 2]], [["a", 0, 1, 1]], None])
def test_another_tools_column_of_that_name_is_no_face(tmp_path: Path, boxes: object) -> None:
    record = ImageRecord(0, "a", jpeg(0), metadata=json.dumps({"unblurred_faces": boxes}))
    list(keep_images(iter([record]), tmp_path, Attempt(SHARD)))
    (found,) = records(
        open_source(SourceSettings(name="webdataset", input=(str(tmp_path),)))
    ).values()
    assert found.faces == ()
