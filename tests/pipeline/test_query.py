"""Queries: every result is traced to the picture, row and column it came from."""

import shutil
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pytest
from PIL import Image

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.generation.picture_grid import save_png
from pipeline.index import index
from pipeline.query import QueryAnswer, load_database_tokenizer, query
from pipeline.sheet import GAP, MARGIN, TILE, draw_sheet
from schemas.settings.index import IndexSettings
from schemas.settings.query import QuerySettings


@pytest.fixture(scope="module")
def indexed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built database with an exact index and, newer, one of codes."""
    database = Path(shutil.copytree(built, tmp_path_factory.mktemp("queried") / "db"))
    index(database, IndexSettings(kind="flat"))
    index(database, IndexSettings())
    return database


@pytest.fixture(scope="module")
def own_picture(indexed: Path, pictures: Path) -> Path:
    """A picture that is in the database with patches."""
    images = lance.dataset(Layout(indexed).images)
    held = images.to_table(columns=["key"], filter="split = 'database'")["key"].to_pylist()
    return pictures / str(min(held))


@pytest.fixture(scope="module")
def answer(indexed: Path, own_picture: Path) -> QueryAnswer:
    """The answer for every position of a picture of the database."""
    return query(QuerySettings(databases=(indexed,), image=own_picture, k=3))


def test_a_picture_of_the_database_finds_itself(answer: QueryAnswer, own_picture: Path) -> None:
    assert len(answer.results) == 506
    for result in answer.results:
        distances = [n.distance for n in result.neighbors]
        assert distances == sorted(distances)
        assert distances[0] == pytest.approx(0, abs=1e-5)
        ties = [n for n in result.neighbors if n.distance < 1e-5]
        if len(ties) < 3:
            here = (own_picture.name, result.row, result.col, result.token)
            assert here in {(n.key.split("/")[-1], n.row, n.col, n.token) for n in ties}


def test_results_are_what_the_source_pictures_hold(answer: QueryAnswer, indexed: Path) -> None:
    """token and key of a neighbour are those of its picture at its row and column."""
    neighbors = [n for r in answer.results[::25] for n in r.neighbors]
    grids = ImageTable(Layout(indexed).images).grids({n.image_id for n in neighbors}, 24)
    for n in neighbors:
        assert grids[n.image_id][n.row, n.col] == n.token


def test_exclude_self_leaves_the_picture_out(indexed: Path, own_picture: Path) -> None:
    settings = QuerySettings(
        databases=(indexed,), image=own_picture, row=5, col=6, k=4, exclude_self=True
    )
    [result] = query(settings).results
    assert len(result.neighbors) == 4
    assert own_picture.name not in {n.key.split("/")[-1] for n in result.neighbors}


def test_a_query_by_tokens_equals_that_of_the_position(answer: QueryAnswer, indexed: Path) -> None:
    result = answer.results[100]
    [typed] = query(QuerySettings(databases=(indexed,), tokens=result.key, k=3)).results
    assert [n.patch_id for n in typed.neighbors] == [n.patch_id for n in result.neighbors]
    assert (typed.row, typed.col, typed.token) == (None, None, None)


def test_json_keeps_its_promise(answer: QueryAnswer) -> None:
    result = answer.to_json()["results"][0]
    assert {"row", "col", "neighbors"} <= result.keys()
    promised = {"rank", "distance", "token", "patch_id", "image_id", "row", "col", "caption", "url"}
    assert promised <= result["neighbors"][0].keys()
    assert [n["rank"] for n in result["neighbors"]] == [1, 2, 3]


def test_more_neighbours_than_patches(indexed: Path, answer: QueryAnswer) -> None:
    """No padding comes back as a result."""
    patches = lance.dataset(Layout(indexed).patches(DatabaseManifest.read(Layout(indexed)).keys))
    count = patches.count_rows()
    asked = QuerySettings(
        databases=(indexed,), tokens=answer.results[0].key, k=count + 7, index="flat"
    )
    [result] = query(asked).results
    assert len({n.patch_id for n in result.neighbors}) == len(result.neighbors) == count
    [some] = query(replace(asked, index="codebook")).results
    assert len({n.patch_id for n in some.neighbors}) == len(some.neighbors) <= count
    assert {n.patch_id for n in some.neighbors} <= {n.patch_id for n in result.neighbors}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "--image FILE or --tokens"),
        ({"row": 3}, "--row and --col go together"),
        ({"row": 0, "col": 0}, r"use rows 1\.\.23 and columns 1\.\.22"),
        ({"row": 24, "col": 3}, r"rows are 0\.\.23"),
        ({"image": None, "tokens": (1, 2, 3)}, "has 3 tokens, but a key of causal-1 has 4"),
        ({"image": None, "tokens": (1, 2, 3, 4096)}, r"token 4096 .* use 0\.\.4095"),
        ({"image": None, "tokens": (1, 2, 3, 4), "exclude_self": True}, "--tokens names none"),
        ({"image": Path("nowhere.jpg")}, "nowhere.jpg"),
        ({"index": "fast"}, "no complete index"),
        ({"databases": (Path("nowhere"),)}, "no database at nowhere"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_bad_queries_are_one_clear_line(
    indexed: Path, own_picture: Path, changes: dict[str, object], message: str
) -> None:
    fields = {"databases": (indexed,), "image": own_picture} | changes
    with pytest.raises(BadInputError, match=message) as error:
        query(QuerySettings(**fields))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_sheet_shows_the_patches_it_lists(
    answer: QueryAnswer, indexed: Path, own_picture: Path, tmp_path: Path
) -> None:
    alone = next(r for r in answer.results if r.neighbors[1].distance > 1e-3)
    found = query(
        QuerySettings(databases=(indexed,), image=own_picture, row=alone.row, col=alone.col, k=2)
    )
    layout = Layout(indexed)
    tokenizer = load_database_tokenizer(layout, found.manifest)
    sheet = draw_sheet(found, tokenizer, "a title")
    save_png(sheet, tmp_path / "new" / "sheet.png")
    drawn = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert drawn.shape == (sheet.height, sheet.width, 3)
    # The picture finds itself first, so its tile stands twice in one row of the sheet.
    top = MARGIN + 64 + 2 * TILE + GAP
    asked = drawn[top : top + TILE, MARGIN : MARGIN + TILE]
    left = MARGIN + TILE + GAP + 3 * GAP
    first = drawn[top : top + TILE, left : left + TILE]
    assert np.array_equal(asked, first)
    assert asked.std() > 5
