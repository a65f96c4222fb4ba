"""Exact search on Ray, queries of a database, learned weights and evaluation, on real databases."""

import json
import shutil
from functools import partial
from pathlib import Path

import lance
import numpy as np
import numpy.typing as npt
import pytest

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import NO_IMAGE, Ids, split_patch_ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook
from arrag_runtime.format.patches import PatchTable
from pipeline.build import build
from pipeline.evaluate import evaluate
from pipeline.index import index
from pipeline.indexing.exact import announce_cost, exact_neighbors, search_on_ray
from schemas.settings.evaluate import EvaluateSettings
from schemas.settings.index import IndexSettings
from schemas.settings.resources import RayResources
from stages.measure.exact_search import Queries, exact_search
from stages.measure.fit_weights import WeightSettings, learn_weights
from stages.measure.sample_queries import sample_queries
from tests.pipeline.conftest import settings
from tests.worlds.command_line import run
from tests.worlds.patch_world import CODES, World, make_world

WEIGHTS = (0.3, 1.2, 0.4, 2.1)


@pytest.fixture(
    scope="module",
    params=[
        IndexSettings(kind="codebook", lists=4, nprobe=2),
        pytest.param(
            IndexSettings(kind="ivfpq", index_key="IVF4,PQ4x4", nprobe=2), marks=pytest.mark.ivfpq
        ),
    ],
    ids=["codebook", "ivfpq"],
)
def indexed(
    built: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """The built database with an exact index and a coarse one, "lists"."""
    database = Path(shutil.copytree(built, tmp_path_factory.mktemp("indexed") / "db"))
    index(database, IndexSettings(kind="flat"))
    index(database, request.param, name="lists")
    return database


@pytest.mark.parametrize("rows", [1, 300, 10_000])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_tasks_find_what_one_process_finds(
    ray_session: None, tmp_path: Path, rows: int, weights: tuple[float, ...] | None
) -> None:
    """Bit for bit, ties, exclusion and skipped copies included, however the table is cut."""
    world = make_world(tmp_path, 5, 3)
    at = np.arange(0, len(world.ids), 29)
    images = split_patch_ids(world.ids[at])[0]
    queries = _queries(world, at, images)
    skip = world.ids[::7]
    local = exact_search(world.table.blocks(), CODES, queries, 90, weights=weights, skip=skip)
    done: list[tuple[int, int]] = []
    search = partial(exact_search, codes=CODES, queries=queries, k=90, weights=weights, skip=skip)
    spread = search_on_ray(
        world.table,
        search,
        rows_a_task=rows,
        progress=lambda n, total: done.append((n, total)),
    )
    for name, values in vars(local).items():
        assert np.array_equal(values, getattr(spread, name)), name
    assert done[-1] == (len(world.ids), len(world.ids))
    assert len(done) == {1: 5, 300: 3, 10_000: 1}[rows]
    chosen = exact_neighbors(
        world.table, CODES, queries, 90, weights=weights, skip=skip, resources=RayResources()
    )
    assert np.array_equal(chosen.places, local.places)


def _queries(world: World, at: npt.NDArray[np.int64], images: Ids) -> Queries:
    return Queries(world.keys[at], world.tokens[at], images, images[:, None], "test")


def test_a_long_search_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is compared and how long it takes; a short one is not worth a word."""
    world = make_world(tmp_path, 2, 2)
    queries = _queries(world, np.arange(4), split_patch_ids(world.ids[:4])[0])
    said: list[str] = []
    assert announce_cost(world.table, CODES, queries, 1, said.append) == 0
    monkeypatch.setattr("pipeline.indexing.exact._FEW_ROWS", 0)
    assert 0 < announce_cost(world.table, CODES, queries, 1, said.append) < 60
    assert said == []
    monkeypatch.setattr("pipeline.indexing.exact._LONG", 0.0)
    announce_cost(world.table, CODES, queries, 2, said.append)
    [line] = said
    assert line.startswith("comparing 4 queries with all 196 entries takes about")
    assert line.endswith("minutes on 2 cores")


def test_queries_are_positions_of_pictures_with_their_true_tokens(built: Path) -> None:
    """Held-out ones first; keys and tokens stand in the pictures' grids; drawn by a seed."""
    layout = Layout(built)
    manifest = DatabaseManifest.read(layout)
    images = ImageTable(layout.images)
    spec, keys = manifest.tokenizer, manifest.keys
    asked = sample_queries(images, spec, keys, pictures=3, queries=40, seed=4)
    assert len(asked.keys) == len(asked.next_tokens) == 40
    rows = images.rows(asked.images.tolist())
    assert {row.split for row in rows.values()} == {"heldout"}
    assert "held-out pictures" in asked.protocol
    grids = images.grids(asked.images.tolist(), spec.grid_height)
    for key, token, image in zip(asked.keys, asked.next_tokens, asked.images, strict=True):
        grid = grids[int(image)]
        every = keys.neighborhood.keys(grid[None])[0]
        at = keys.neighborhood.positions(*grid.shape)[(every == key).all(axis=1)]
        assert token in grid.reshape(-1)[at]
    own = sample_queries(images, spec, keys, pictures=3, queries=40, seed=4, split="database")
    assert (own.exclude[:, 0] == own.images).all()
    assert not set(own.images) & set(asked.images)
    again = sample_queries(images, spec, keys, pictures=3, queries=40, seed=4)
    assert np.array_equal(again.keys, asked.keys)
    other = sample_queries(images, spec, keys, pictures=3, queries=40, seed=5)
    assert not np.array_equal(other.keys, asked.keys)


def test_copies_of_held_out_pictures_are_excluded(copied: Path) -> None:
    """A copy that stayed in the database would answer for the picture itself."""
    layout = Layout(copied)
    manifest = DatabaseManifest.read(layout)
    table = lance.dataset(layout.images)
    rows = table.to_table(columns=["image_id", "split", "sha256"]).to_pylist()
    [held, *_] = (row for row in rows if row["split"] == "heldout")
    [stayed, *_] = (row for row in rows if row["split"] == "database")
    table.update({"sha256": f"'{held['sha256']}'"}, where=f"image_id = {stayed['image_id']}")
    images = ImageTable(layout.images)
    asked = sample_queries(images, manifest.tokenizer, manifest.keys, pictures=9, queries=200)
    assert "held-out" in asked.protocol
    its = asked.images == held["image_id"]
    assert its.any()
    assert (asked.exclude[its] == stayed["image_id"]).all()
    assert (asked.exclude[~its] == NO_IMAGE).all()


def test_weights_are_learned_from_a_database(built: Path) -> None:
    """From its own pictures, half of them to judge by; nothing is written."""
    layout = Layout(built)
    manifest = DatabaseManifest.read(layout)
    found = learn_weights(
        PatchTable(layout.patches(manifest.keys)),
        ImageTable(layout.images),
        manifest.tokenizer,
        manifest.keys,
        read_codebook(layout),
        np.empty(0, np.int64),
        WeightSettings(entries=2000, pictures=3, queries=100, k=50, rounds=2),
    )
    assert np.mean(found.weights) == pytest.approx(1)
    assert found.entries == 2000
    assert 150 <= found.queries + int(found.judged_on.split()[0]) <= 200
    low, high = found.gain_interval
    assert low <= found.gain <= high


def test_indexes_are_evaluated_side_by_side(indexed: Path) -> None:
    """The exact one recalls all; both beat random codes; rows beyond the coarse one's lists lack."""
    found = evaluate(EvaluateSettings(database=indexed, pictures=3, queries=120, k=200))
    exact, coarse = found.indexes
    assert (exact.name, coarse.name, coarse.nprobe) == ("flat", "lists", 2)
    assert exact.figures.recall["10"].mean == 1
    assert 0.1 < coarse.figures.recall["10"].mean < 1
    for one in found.indexes:
        assert one.figures.token_distance[0].mean < one.figures.random_distance.mean
        assert one.figures.prior_distance == exact.figures.prior_distance
        assert one.figures.queries == 120
        assert "held-out" in one.protocol
    text = found.to_text()
    assert "recall@100" in text
    assert "distance of the nearest" in text
    assert "flat, -" in text
    [gains] = (line for line in text.splitlines() if "gain over flat" in line)
    assert gains.split()[3] == "-"
    fields = found.to_json()["indexes"]
    assert list(fields) == ["flat", "lists"]
    assert fields["flat"]["recall_at_10"] == 1
    assert len(fields["flat"]["token_distance"]) == 100
    assert exact.gain is None
    assert coarse.gain is not None
    difference = exact.figures.nll.mean - coarse.figures.nll.mean
    assert coarse.gain.mean == pytest.approx(difference)
    assert fields["lists"]["nll_gain_over_first"]["mean"] == coarse.gain.mean
    [alone] = evaluate(
        EvaluateSettings(database=indexed, indexes=("flat",), pictures=3, queries=120, k=200)
    ).indexes
    assert alone == exact


def test_a_database_without_held_out_pictures_asks_with_its_own(copied: Path) -> None:
    """They do not find themselves, and the text says whose they are."""
    lance.dataset(Layout(copied).images).delete("split = 'heldout'")
    with pytest.raises(BadInputError, match="no index to evaluate"):
        evaluate(EvaluateSettings(database=copied))
    index(copied, IndexSettings(kind="flat"))
    [one] = evaluate(EvaluateSettings(database=copied, pictures=3, queries=50)).indexes
    assert "pictures of the database, their own excluded" in one.protocol
    assert one.figures.recall["100"].mean == 1
    assert one.figures.mean_results == 2048


def test_an_index_is_judged_by_what_it_holds_and_in_its_own_metric(copied: Path) -> None:
    """Weights, entries stored once for several, and copies left out: all lists still find all."""
    layout = Layout(copied)
    table = lance.dataset(layout.images)
    rows = table.to_table(columns=["image_id"], filter="split = 'database'").to_pylist()
    same = ", ".join(str(row["image_id"]) for row in rows[:2])
    table.update({"sha256": f"'{'ab' * 32}'"}, where=f"image_id IN ({same})")
    made = index(
        copied,
        IndexSettings(
            kind="codebook",
            lists=4,
            nprobe=4,
            weights="0.3,1.2,0.4,2.1",
            max_copies=1,
            dedup="images",
        ),
    )
    assert made.entries < made.count < PatchTable(layout.patches(made.keys)).count
    [one] = evaluate(EvaluateSettings(database=copied, pictures=3, queries=100, k=300)).indexes
    assert one.weights == pytest.approx(WEIGHTS)
    assert [found.mean for found in one.figures.recall.values()] == [1, 1, 1]


@pytest.mark.slow
def test_latent_keys_are_asked_with_tokens(
    ray_session: None, pictures: Path, tmp_path: Path
) -> None:
    """Entries are what the encoder gave, queries are codes, all neighbours or zeros; nothing breaks."""
    database = tmp_path / "db"
    build(settings(database, pictures, key_space="latent", border="zero", hold_out=0.3))
    index(database, IndexSettings(kind="flat"))
    [one] = evaluate(EvaluateSettings(database=database, pictures=3, queries=100, k=300)).indexes
    assert one.keys == "causal-1-zero-latent"
    assert [found.mean for found in one.figures.recall.values()] == [1, 1, 1]
    assert one.figures.token_distance[0].mean < one.figures.random_distance.mean
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    found = learn_weights(
        PatchTable(layout.patches(manifest.keys)),
        ImageTable(layout.images),
        manifest.tokenizer,
        manifest.keys,
        read_codebook(layout),
        np.empty(0, np.int64),
        WeightSettings(entries=2000, pictures=3, queries=100, k=50, rounds=1),
    )
    assert np.mean(found.weights) == pytest.approx(1)
    assert found.learned < found.prior


def test_the_command_prints_a_table_json_and_draws(
    indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate", "--db", indexed, "--pictures", "3", "--queries", "60", "-k", "150")
    code, out, err = run(capsys, *words, "--index", "flat", "--plot", tmp_path / "plot.png")
    assert code == 0, err
    assert "negative log likelihood" in out
    assert f"plot: {tmp_path / 'plot.png'}" in out
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert set(json.loads(out)["indexes"]) == {"flat", "lists"}
    code, _, err = run(capsys, *words, "--index", "nowhere")
    assert code == 1
    assert "no complete index" in err


def test_nothing_is_excluded_where_nothing_could_be_found(built: Path) -> None:
    """Held-out pictures have no patches, so a search for theirs need not look for any to drop."""
    layout = Layout(built)
    manifest = DatabaseManifest.read(layout)
    asked = sample_queries(
        ImageTable(layout.images), manifest.tokenizer, manifest.keys, pictures=3, queries=10
    )
    assert asked.exclude.tolist() == [[NO_IMAGE]] * 10
