"""What docs/removal.md shows, in its order, on a small database."""

import re
import shlex
from pathlib import Path
from typing import Any

import lance
import pytest

from arrag_runtime.format.manifest import Layout
from pipeline.index import index
from schemas.settings.index import IndexSettings
from tests.worlds.command_line import run
from tests.worlds.removal_world import make_database, picture_bytes, sha256

GUIDE = Path(__file__).parents[2] / "docs" / "removal.md"


def blocks(language: str) -> list[str]:
    """The guide's blocks of code in this language; commands have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [code for named, code in found if named == language]


def commands() -> list[list[str]]:
    """Every command of the guide as words, in its order."""
    return [shlex.split(line) for block in blocks("") for line in block.splitlines()]


def test_the_guide_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = make_database(tmp_path / "mydb")
    index(layout.root, IndexSettings())
    make_database(tmp_path / "otherdb", shards=2)
    Path("the-picture-i-was-sent.jpg").write_bytes(picture_bytes(8))
    said: list[str] = []
    for program, command, *words in commands():
        assert program == "arrag-db"
        options = [_meant(word, layout) for word in words]
        if command == "remove" and not {"--dry-run", "--export"} & set(options):
            options.append("--yes")
        code, out, err = run(capsys, command, *options)
        assert code == 0, (command, options, err)
        said.append(out)
    assert [text.splitlines()[0] for text in said[:2]] == ["3 pictures match", "1 pictures match"]
    assert "removed 3 pictures" in said[2]
    assert all(line.startswith("ok ") for line in (said[3] + said[5]).splitlines())
    assert said[4].startswith("deleted 3 pictures")
    assert "+ 3 removed" in said[6]
    assert said[7] == "3 rows: removed.csv\n"
    assert "removed 2 pictures" in said[8]
    assert "1 entries without a picture here" in said[8]
    assert len(said) == 10


def test_the_same_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layout = make_database(tmp_path / "mydb")
    names: dict[str, Any] = {}
    [code] = blocks("python")
    exec(code, names)
    assert names["receipt"].images == 3
    assert lance.dataset(layout.images).count_rows() == 15


def _meant(word: str, layout: Layout) -> str:
    """A word of the guide with its placeholders filled in."""
    if word == "ID":
        [receipt] = Path(layout.receipts).glob("*.json")
        return receipt.stem
    return word.replace("HASH", sha256(900)).replace("photos.example.org", "a.org")
