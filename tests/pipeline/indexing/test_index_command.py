"""Indexing a database: what a build leaves to be indexed, and what a killed indexing leaves."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.manifest import Layout
from arrag_runtime.search.patch_index import PatchIndex, index_folders
from pipeline.build import BuildReport, build
from pipeline.index import index
from pipeline.indexing.growth import index_to_build
from pipeline.query import query
from schemas.settings.index import IndexSettings
from schemas.settings.query import QuerySettings
from tests.pipeline.conftest import settings, write_picture


@pytest.mark.parametrize(
    "wanted",
    [
        IndexSettings(kind="codebook", lists=5),
        pytest.param(IndexSettings(kind="ivfpq", index_key="IVF4,PQ4x4"), marks=pytest.mark.ivfpq),
    ],
    ids=["codebook", "ivfpq"],
)
def test_a_build_brings_the_newest_index_up_to_date_as_it_was_made(
    ray_session: None, copied: Path, pictures: Path, tmp_path: Path, wanted: IndexSettings
) -> None:
    assert index_to_build(copied) == (None, IndexSettings())
    made = index(copied, wanted, name="mine")
    key = wanted.index_key or "IVF5,PQ4x12 (the codebook)"
    assert (made.name, made.kind, made.index_key) == ("mine", wanted.kind, key)
    assert index_to_build(copied) is None
    grown = Path(shutil.copytree(pictures, tmp_path / "grown"))
    write_picture(grown / "new.jpg", 77)
    build(settings(copied, grown))
    assert index_to_build(copied) == ("mine", wanted)


def test_what_a_killed_indexing_leaves_is_no_index_and_goes_away(copied: Path) -> None:
    layout = Layout(copied)
    index(copied, IndexSettings(kind="flat"))
    flat = Path(layout.index("flat"))
    shutil.copytree(flat, flat.with_name(".building-other"))
    flat.rename(flat.with_name(".old-flat"))
    assert index_folders(layout) == []
    index(copied, IndexSettings(kind="flat"), name="other")
    assert sorted(p.name for p in flat.parent.iterdir()) == ["flat", "other"]
    assert PatchIndex.open(copied, "flat").count == PatchIndex.open(copied, "other").count


@pytest.mark.parametrize("name", ["../up", ".hidden", "", "a/b"])
def test_names_that_are_no_folders_are_refused(built: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="no name for a folder"):
        index(built, IndexSettings(), name=name)


@pytest.mark.ivfpq
def test_any_faiss_key_can_be_indexed(copied: Path) -> None:
    made = index(copied, IndexSettings(kind="ivfpq", index_key="HNSW16"))
    assert made.nprobe is None
    assert made.code_bytes_per_key > 0
    assert made.recall_at_10 > 0.5


def test_copies_of_a_picture_are_left_out_with_it(
    repeated: tuple[Path, BuildReport], pictures: Path, tmp_path: Path
) -> None:
    """Also when recall is measured: a copy would answer for the picture itself."""
    database = Path(shutil.copytree(repeated[0], tmp_path / "db"))
    index(database, IndexSettings())
    asked = QuerySettings(databases=(database,), image=pictures / "05.jpg", row=3, col=3, k=5)
    [every] = query(asked).results
    own = {n.image_id for n in every.neighbors if n.key.removesuffix(".jpg") == "05"}
    assert len(own) == 2
    [result] = query(replace(asked, exclude_self=True)).results
    assert len(result.neighbors) == 5
    assert own.isdisjoint(neighbor.image_id for neighbor in result.neighbors)
