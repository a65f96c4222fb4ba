"""The kind ivfpq as users type it: trained by autofaiss, certified and asked; refused without it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import IndexManifest, Layout
from pipeline.compact import compact
from pipeline.index import index
from schemas.settings.index import IndexSettings
from tests.worlds.command_line import run


@pytest.mark.ivfpq
def test_a_database_is_built_indexed_certified_and_asked(
    ray_session: None, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The released layout, OPQ8_32,IVFn,PQ8x8, from pictures to neighbours that are traced."""
    db = tmp_path / "db"
    source = ("--source", "folder", "--input", pictures)
    code, _, err = run(capsys, "build", *source, "--db", db, "--no-index", "--quiet")
    assert code == 0, err
    code, out, err = run(capsys, "index", "--db", db, "--kind", "ivfpq")
    assert code == 0, err
    assert "index ivfpq: OPQ8_32,IVF" in out
    code, out, _ = run(capsys, "info", "--db", db, "--json")
    made = json.loads(out)["indexes"]["ivfpq"]
    assert (code, made["kind"], made["code_bytes_per_key"]) == (0, "ivfpq", 8)
    assert made["keys"] == json.loads(out)["patches"]
    assert 0.1 < made["recall_at_10"] <= 1
    certificate = IndexManifest.read(Layout(db).index("ivfpq")).certificate
    assert certificate["chosen"]["recall"]["10"] == made["recall_at_10"]
    asked = ("--image", pictures / "02.jpg", "--row", "3", "--col", "4", "-k", "5")
    code, out, err = run(capsys, "query", "--db", db, *asked, "--json")
    assert code == 0, err
    [result] = json.loads(out)["results"]
    assert len(result["neighbors"]) == 5
    images = [neighbor["image_id"] for neighbor in result["neighbors"]]
    assert images == [neighbor["patch_id"] >> 10 for neighbor in result["neighbors"]]
    assert ImageTable(Layout(db).images).rows(images).keys() == set(images)
    code, out, _ = run(capsys, "verify", "--db", db, "--json")
    assert code == 0, out


@pytest.fixture
def without_autofaiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment that lacks it, whichever this one is."""
    monkeypatch.setattr("stages.index.faiss_index.find_spec", lambda _name: None)


@pytest.mark.parametrize(
    "words",
    [("--kind", "ivfpq"), ("--index-key", "IVF4,PQ4x4"), ("--kind", "ivfpq", "--name", "a")],
)
def test_without_autofaiss_one_line_says_what_to_install(
    copied: Path,
    without_autofaiss: None,
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the database is as it was, but for the record of the writer that came and went."""
    before = contents(copied)
    code, out, err = run(capsys, "index", "--db", copied, *words)
    assert (code, out) == (1, "")
    [line] = err.strip().splitlines()
    assert "`pip install 'arrag[ivfpq]'`" in line
    assert contents(copied) == before


def test_other_kinds_do_not_need_it(copied: Path, without_autofaiss: None) -> None:
    """Nor does whatever reads an index."""
    assert index(copied, IndexSettings(kind="flat")).recall_at_10 == 1
    assert index(copied, IndexSettings(kind="codebook")).kind == "codebook"


def test_a_compaction_that_could_not_index_again_does_not_begin(
    copied: Path, without_autofaiss: None
) -> None:
    """It would take the table's rows away from below the index that was made of them."""
    folder = Layout(copied).index("flat")
    replace(index(copied, IndexSettings(kind="flat")), kind="ivfpq").write(folder)
    before = contents(copied)
    with pytest.raises(ArragError, match=r"arrag\[ivfpq\]"):
        compact(copied)
    assert contents(copied) == before


def contents(database: Path) -> dict[str, bytes]:
    """Every file of a database but its leases."""
    files = (path for path in database.rglob("*") if path.is_file())
    named = {str(path.relative_to(database)): path for path in files}
    return {
        name: path.read_bytes() for name, path in named.items() if not name.startswith("leases/")
    }
