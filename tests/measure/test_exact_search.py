"""Exact search against loops over every entry, however the table is cut."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stages.measure.exact_search
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import NO_IMAGE, split_patch_ids
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.patches import PatchBlock, PatchTable
from arrag_runtime.format.specs import key_vectors
from arrag_runtime.search.neighbors import Neighbors
from stages.measure.exact_search import (
    Queries,
    exact_search,
    merge_nearest,
    true_distances,
)
from tests.worlds.patch_world import CODES, KEYS, PER_IMAGE, World, add_shard, make_world

WEIGHTS = (0.3, 1.9, 0.0, 1.8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four shards with few codes and borders of zeros, so that many entries are equally near."""
    return make_world(tmp_path_factory.mktemp("db"), 4, 3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and several overflows of the newcomers even in a small table."""
    monkeypatch.setattr(stages.measure.exact_search, "_TILE", 32)
    monkeypatch.setattr(stages.measure.exact_search, "_QUERY_TILE", 3)


def queries_at(world: World, at: npt.NDArray[Any], *, own: bool, width: int = 1) -> Queries:
    """The keys of some entries, with their own pictures left out or not."""
    images = split_patch_ids(world.ids[at])[0]
    exclude = np.full((len(at), width), NO_IMAGE)
    if own:
        exclude[:, -1] = images
    return Queries(world.keys[at], world.tokens[at], images, exclude, "test")


def by_loop(
    world: World, query: Queries, row: int, k: int, weights: Any, skip: set[int]
) -> list[tuple[float, int]]:
    """(distance, table row) of the nearest, each offset's distance summed by itself."""
    vectors = world.vectors.astype(np.float64).reshape(len(world.ids), 4, 4)
    wide = key_vectors(query.keys[row : row + 1], CODES).astype(np.float64).reshape(4, 4)
    found = []
    for at, entry in enumerate(vectors):
        identity = int(world.ids[at])
        if identity >> 10 in query.exclude[row] or identity in skip:
            continue
        offsets = ((entry - wide) ** 2).sum(axis=1)
        found.append((sum(w * d for w, d in zip(weights or (1,) * 4, offsets, strict=True)), at))
    return sorted(found)[:k]


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 2, 9, 100, 587, 588, 700]),
    own=st.booleans(),
    weights=st.sampled_from([None, WEIGHTS]),
    skipping=st.booleans(),
    size=st.sampled_from([1000, 49, 20]),
)
def test_the_nearest_are_those_of_a_loop(
    world: World,
    seed: int,
    k: int,
    own: bool,
    weights: tuple[float, ...] | None,
    skipping: bool,
    size: int,
) -> None:
    """Distances to 1e-5; all entries nearer than the last are there; fewer than k are padded."""
    rng = np.random.default_rng(seed)
    at = rng.choice(len(world.ids), 5, replace=False)
    queries = queries_at(world, at, own=own, width=2)
    skip = np.sort(rng.choice(world.ids, 100, replace=False)) if skipping else None
    found = exact_search(world.table.blocks(size), CODES, queries, k, weights=weights, skip=skip)
    assert found.distances.shape == found.places.shape == found.tokens.shape == (5, k)
    for row in range(5):
        expected = by_loop(world, queries, row, k, weights, set(() if skip is None else skip))
        count = int(found.count[row])
        assert count == len(expected)
        rows = found.places[row, :count]
        assert len(set(rows.tolist())) == count
        assert np.allclose(found.distances[row, :count], [d for d, _ in expected], atol=1e-5)
        nearer = {r for d, r in expected if d < expected[-1][0] - 1e-5}
        assert nearer <= set(rows.tolist())
        assert np.array_equal(found.patch_ids[row, :count], world.ids[rows])
        assert np.array_equal(found.tokens[row, :count], world.tokens[rows])
        assert np.isinf(found.distances[row, count:]).all()
        assert (found.places[row, count:] == -1).all()
        assert (found.patch_ids[row, count:] == -1).all()
        assert (found.tokens[row, count:] == 0).all()


@pytest.mark.parametrize("k", [1, 10, 300, 600])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_parts_searched_apart_give_what_one_search_gives(
    world: World, k: int, weights: tuple[float, ...] | None
) -> None:
    """Bit for bit, ties included, in any order of merging and with blocks of any size."""
    at = np.arange(0, len(world.ids), 37)
    queries = queries_at(world, at, own=True)
    whole = exact_search(world.table.blocks(), CODES, queries, k, weights=weights)
    parts = world.table.parts(300)
    assert [part.count for part in parts] == [2 * 147, 2 * 147]
    assert [part.start for part in parts] == [0, 294]
    apart = [
        exact_search(
            world.table.blocks(30, part),
            CODES,
            queries,
            k,
            weights=weights,
            first_row=part.start,
        )
        for part in parts
    ]
    assert_same(merge_nearest(apart), whole)
    assert_same(merge_nearest(apart[::-1]), whole)


def assert_same(one: Neighbors, other: Neighbors) -> None:
    for name, values in vars(one).items():
        assert np.array_equal(values, getattr(other, name)), name


def test_of_equally_near_entries_the_first_rows_are_kept(tmp_path: Path) -> None:
    """A table of one colour: every entry is at distance 0."""
    layout = make_world(tmp_path, 0, 0).layout
    add_shard(layout, 1, np.full((6, 7, 7), 5, np.uint16))
    table = PatchTable(layout.patches(KEYS))
    key = np.full((2, 4), 5, np.uint16)
    queries = Queries(key, key[:, 0], np.zeros(2, np.int64), np.full((2, 1), NO_IMAGE), "test")
    inner = np.flatnonzero((np.concatenate([b.keys for b in table.blocks()]) == 5).all(axis=1))
    found = exact_search(table.blocks(), CODES, queries, 60)
    assert (found.distances == 0).all()
    assert found.places.tolist() == [inner[:60].tolist()] * 2


def test_missing_neighbours_are_zero_vectors(world: World) -> None:
    """A key without any neighbour is at squared distance 1 from each neighbour that exists."""
    key = np.full((1, 4), MISSING, np.uint16)
    queries = Queries(key, key[:, 0], np.zeros(1, np.int64), np.full((1, 1), NO_IMAGE), "test")
    found = exact_search(world.table.blocks(), CODES, queries, len(world.ids), weights=WEIGHTS)
    present = world.keys[found.places[0]] != MISSING
    assert np.allclose(found.distances[0], present @ np.array(WEIGHTS), atol=1e-5)
    assert found.distances[0, 0] == 0


def test_latent_keys_are_compared_as_vectors() -> None:
    """Queries are tokens, entries are float16 vectors; weights scale both."""
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(90, 16)).astype(np.float16)
    keys = rng.integers(0, 24, (4, 4)).astype(np.uint16)
    ids = np.arange(90, dtype=np.int64) << 10

    def blocks() -> Iterator[PatchBlock]:
        for start in range(0, 90, 40):
            cut = slice(start, start + 40)
            yield PatchBlock(ids[cut], latents[cut], np.arange(90, dtype=np.uint16)[cut])

    queries = Queries(keys, keys[:, 0], ids[:4], np.full((4, 1), NO_IMAGE), "test")
    found = exact_search(blocks(), CODES, queries, 7, weights=WEIGHTS)
    scale = np.repeat(WEIGHTS, 4)
    for row, key in enumerate(key_vectors(keys, CODES).astype(np.float64)):
        distances = ((latents.astype(np.float64) - key) ** 2) @ scale
        order = np.argsort(distances)[:7]
        assert found.tokens[row].tolist() == order.tolist()
        assert np.allclose(found.distances[row], distances[order], rtol=1e-5)


def test_true_distances_are_those_of_the_entries_named(world: World) -> None:
    """In any order; infinite for none and for ids of no entry."""
    at = np.array([3, 200, 411])
    queries = queries_at(world, at, own=False)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(world.ids), (3, 20))
    ids = world.ids[rows]
    ids[:, 5], ids[1, 7] = -1, 12345
    found = true_distances(world.table.blocks(100), CODES, queries, ids, weights=WEIGHTS)
    vectors = key_vectors(world.keys, CODES, WEIGHTS).astype(np.float64)
    for row in range(3):
        for column in range(20):
            if column == 5 or (row, column) == (1, 7):
                assert np.isinf(found[row, column])
            else:
                exact = ((vectors[rows[row, column]] - vectors[at[row]]) ** 2).sum()
                assert abs(found[row, column] - exact) < 1e-5
    assert np.isinf(true_distances([], CODES, queries, ids)).all()


def test_a_search_of_nothing_finds_nothing(world: World) -> None:
    """No blocks, all skipped, or the only pictures excluded."""
    queries = queries_at(world, np.arange(2), own=False)
    for blocks, skip in (([], None), (world.table.blocks(), np.sort(world.ids))):
        found = exact_search(blocks, CODES, queries, 5, skip=skip)
        assert found.count.tolist() == [0, 0]
        assert (found.places == -1).all()
    with pytest.raises(BadInputError, match="k is 0"):
        exact_search([], CODES, queries, 0)


def test_weights_scale_offsets() -> None:
    """√w on each neighbour's values, of tokens and of latents."""
    keys = np.array([[1, 2, MISSING, 4]], np.uint16)
    scaled = key_vectors(keys, CODES, WEIGHTS).reshape(4, 4)
    plain = key_vectors(keys, CODES).reshape(4, 4)
    assert np.allclose(scaled, plain * np.sqrt(np.array(WEIGHTS))[:, None], atol=1e-6)
    assert np.array_equal(key_vectors(keys, CODES, (1.0,) * 4).reshape(4, 4), plain)
    latents = np.ones((1, 16), np.float16)
    assert np.allclose(key_vectors(latents, CODES, WEIGHTS)[0], np.repeat(np.sqrt(WEIGHTS), 4))


def test_the_world_has_ties_and_whole_pictures(world: World) -> None:
    """What these tests rely on: several equal keys, and as many patches a picture as positions."""
    assert len(np.unique(world.keys, axis=0)) < len(world.keys)
    assert len(world.ids) == 12 * PER_IMAGE
