"""A new source is one file and one line: nothing else of the product says a source's name."""

import ast
from pathlib import Path

import pytest

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord
from schemas.settings.source import SourceSettings
from stages.sources import SOURCES, count_inputs, locate_source, open_source, source_kind
from tests.conftest import jpeg
from tests.test_architecture import ROOT, TREES
from tests.worlds.source_cases import items_of

PRODUCTS = frozenset(SOURCES) - {"links"}
ORDINARY = frozenset(("sample", "folder", "parquet", "tokens"))
"""Names that are also words: of the bundled weights, of columns, of formats."""
MADE_UP = """
from stages.sources.folder import FolderSource
from stages.sources.reading.source_kind import SourceKind

SOURCE = SourceKind(open=FolderSource, options=("scale",), reads=(".made-up",), gated=True)
"""


def names_said(tree: ast.AST) -> set[str]:
    """The sources' names among a file's string constants, but for the names of column presets."""
    presets = {
        id(key)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRESETS"
        for key in ast.walk(node)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in PRODUCTS and id(node) not in presets
    }


def test_a_source_is_named_in_its_file_and_in_one_line() -> None:
    """One place for each in `SOURCES`, and no branch on a name anywhere else."""
    room = "stages/sources/__init__.py"
    lines = (ROOT / room).read_text().splitlines()
    for name in PRODUCTS:
        assert sum(f'"{name}"' in line for line in lines) == 1, name
        places = {path for path, tree in TREES.items() if name in names_said(tree)}
        if name in ORDINARY:
            places = {path for path in places if path.startswith("stages/sources/")}
            places -= {"stages/sources/reading/columns.py"}  # A column of grids is called tokens.
        assert places - {room, f"stages/sources/{name}.py"} == set(), name


def test_a_made_up_source_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file and its entry are enough to locate, count, list and read it, and to refuse."""
    (tmp_path / "made_up_source.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "made-up", "made_up_source")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.made-up").write_bytes(b"")
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(0))
    settings = SourceSettings(name="made-up", input=(str(tmp_path / "pictures"),), scale="large")
    (item,) = items_of(open_source(locate_source(settings)))
    assert isinstance(item, ImageRecord)
    assert count_inputs(settings).inputs == 1
    assert source_kind("made-up").gated
    with pytest.raises(
        BadInputError, match=r"--scale is for --source datacomp, made-up, not folder"
    ):
        locate_source(SourceSettings(name="folder", input=settings.input, scale="large"))
    (tmp_path / "pictures" / "a.jpg").unlink()
    with pytest.raises(BadInputError, match=r"\.made-up files, which --source made-up reads"):
        locate_source(SourceSettings(name="folder", input=settings.input))
