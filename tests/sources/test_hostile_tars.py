"""Tars from outside: what each odd entry becomes, and that none reaches outside the tar."""

import io
import tarfile
from pathlib import Path

import pytest

from schemas.records import GridRecord, ImageRecord, Reject, pack_records, unpack_records
from schemas.settings.source import SourceSettings
from stages.encode.decode import DecodeSettings, UndecodableError, decode_image
from stages.sources import open_source
from tests.conftest import jpeg
from tests.worlds.source_cases import packable, read_all

Entry = tuple[str, bytes | tuple[bytes, str]]
"""A name, and its content or the type and target of what is no file."""

OUTSIDE = "/etc/hostname"
DEEP = b"[" * 200_000

HOSTILE: dict[str, tuple[list[Entry], dict[str, str]]] = {
    "a path upwards": ([("../../x.jpg", jpeg(1))], {"../../x": "picture"}),
    "an absolute path": ([("/etc/x.jpg", jpeg(1))], {"/etc/x": "picture"}),
    "a symbolic link": ([("x.jpg", (tarfile.SYMTYPE, OUTSIDE))], {}),
    "a link upwards": ([("x.jpg", (tarfile.SYMTYPE, "../../x"))], {}),
    "a hard link": ([("x.jpg", (tarfile.LNKTYPE, OUTSIDE))], {}),
    "a pipe": ([("x.jpg", (tarfile.FIFOTYPE, ""))], {}),
    "a device": ([("x.jpg", (tarfile.CHRTYPE, ""))], {}),
    "a folder": ([("x.jpg", (tarfile.DIRTYPE, ""))], {}),
    "a link instead of a caption": (
        [("x.jpg", jpeg(1)), ("x.txt", (tarfile.SYMTYPE, OUTSIDE))],
        {"x": "picture"},
    ),
    "a name twice": ([("x.jpg", jpeg(1)), ("x.jpg", jpeg(2))], {"x": "name-twice"}),
    "a null in a name": ([("x\0y.jpg", jpeg(1))], {}),
    "a line break in a name": ([("x\ny.jpg", jpeg(1))], {"x\ny": "picture"}),
    "no name before the dot": ([(".jpg", jpeg(1))], {}),
    "zero bytes": ([("x.jpg", b"")], {"x": "empty"}),
    "text as a picture": ([("x.jpg", b"<html>")], {"x": "not-an-image"}),
    "nulls as a picture": ([("x.jpg", bytes(5000))], {"x": "not-an-image"}),
    "half a picture": ([("x.jpg", jpeg(1)[:400])], {"x": "truncated"}),
    "only a caption": ([("x.txt", b"hello")], {"x": "no-image"}),
    "nulls everywhere": (
        [("x.jpg", jpeg(1)), ("x.json", b'{"caption":null,"url":null,"licence":null,"a":null}')],
        {"x": "picture"},
    ),
    "json that is none": ([("x.jpg", jpeg(1)), ("x.json", b"\xff\xfe{")], {"x": "picture"}),
    "json without end": ([("x.jpg", jpeg(1)), ("x.json", DEEP)], {"x": "picture"}),
    "a number without end": (
        [("x.jpg", jpeg(1)), ("x.json", b'{"a": ' + b"9" * 9000 + b"}")],
        {"x": "picture"},
    ),
    "values of other types": (
        [("x.jpg", jpeg(1)), ("x.json", b'{"caption": [1], "url": {"a": 1}, "licence": 7}')],
        {"x": "picture"},
    ),
    "a caption in no encoding": ([("x.jpg", jpeg(1)), ("x.txt", b"\xff\xfe\0")], {"x": "picture"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_entries(case: str, tmp_path: Path) -> None:
    """The outcome of each, and the sample after it is read all the same."""
    entries, expected = HOSTILE[case]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in (*entries, ("last.jpg", jpeg(9))):
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    source = open_source(SourceSettings(name="webdataset", input=(str(path),)))
    items = [item for found in read_all(source).values() for item in found]
    packed = list(unpack_records(pack_records(packable(items))))
    assert {item.key: outcome(item) for item in packed} == expected | {"last": "picture"}
    assert [item.row for item in packed] == list(range(len(packed)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def outcome(item: ImageRecord | GridRecord | Reject) -> str:
    """What becomes of an input, decoded where it can be."""
    if isinstance(item, Reject):
        return item.reason
    assert isinstance(item, ImageRecord)
    try:
        decode_image(item.data, DecodeSettings())
    except UndecodableError as error:
        return error.reason
    return "picture"
