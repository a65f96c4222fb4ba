"""Coarse lists: trained in one level or two, and which of them a key is in."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stages.index.coarse_lists
from stages.index.coarse_lists import ListFinder, _apportion, nearest, train_centroids
from tests.worlds.code_world import (
    check_answer,
    expected_entries,
    make_codes,
    open_codes,
    write_codes,
)


@pytest.fixture
def two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Already with few lists."""
    monkeypatch.setattr(stages.index.coarse_lists, "_TWO_LEVELS_FROM", 32)


def test_one_level_finds_the_nearest_list() -> None:
    world = make_codes(count=600)
    centroids = train_centroids(world.vectors, 20, seed=0)
    assert centroids.shape == (20, 16)
    distances = ((world.vectors[:, None] - centroids[None]) ** 2).sum(axis=2)
    found = ListFinder(centroids)(world.vectors)
    assert np.allclose(distances[np.arange(600), found], distances.min(axis=1), atol=1e-5)
    # Trained: nearer than points of the sample would be.
    drawn = nearest(world.vectors[:20], world.vectors)
    spread = ((world.vectors - world.vectors[:20][drawn]) ** 2).sum(axis=1).mean()
    assert distances.min(axis=1).mean() < spread


def test_two_levels_find_nearly_always_the_nearest(two_levels: None) -> None:
    """And, when it is not the nearest, one that is hardly farther."""
    world = make_codes(count=4000, vocabulary=200)
    centroids = train_centroids(world.vectors, 150, seed=0)
    assert centroids.shape == (150, 16)
    assert np.isfinite(centroids).all()
    exact = nearest(centroids, world.vectors)
    found = ListFinder(centroids)(world.vectors)
    assert (found == exact).mean() >= 0.95
    missed = ((world.vectors - centroids[found]) ** 2).sum(axis=1)
    best = ((world.vectors - centroids[exact]) ** 2).sum(axis=1)
    assert missed.mean() <= 1.01 * best.mean()
    # Two levels cluster about as well as one.
    one_level = np.asarray(faiss.knn(world.vectors, _flat_kmeans(world.vectors, 150), 1)[0])
    assert best.mean() <= 1.1 * one_level.mean()


def _flat_kmeans(vectors: npt.NDArray[Any], lists: int) -> npt.NDArray[Any]:
    kmeans = faiss.Kmeans(vectors.shape[1], lists, niter=10, min_points_per_centroid=1)
    kmeans.train(vectors)
    return np.asarray(kmeans.centroids)


def test_an_index_in_two_levels_loses_no_key(two_levels: None, tmp_path: Path) -> None:
    """All lists together hold everything, whichever list a key went to."""
    world = make_codes(count=1500)
    opened = open_codes(tmp_path, world, write_codes(tmp_path, world, 60, cuts=[700]))
    found = opened.search(world.keys[::300], 2000)
    for row, at in enumerate(range(0, 1500, 300)):
        check_answer(found, row, world, world.keys[at : at + 1], expected_entries(world))


def test_the_list_of_a_key_does_not_depend_on_its_company(two_levels: None) -> None:
    """Parts of the keys, alone or together, go where all of them together go."""
    world = make_codes(count=700)
    finder = ListFinder(train_centroids(world.vectors, 40, seed=0))
    together = finder(world.vectors)
    for size in (1, 13, 300):
        apart = [finder(world.vectors[at : at + size]) for at in range(0, 700, size)]
        assert np.array_equal(np.concatenate(apart), together)
    assert len(finder(world.vectors[:0])) == 0


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any), share=st.floats(0, 1)
)
def test_lists_are_apportioned_by_points(sizes: list[int], share: float) -> None:
    """Exactly as many as asked for, in no group more than it has points or than one off its share."""
    points = np.array(sizes, np.int64)
    lists = max(1, int(share * points.sum()))
    shares = _apportion(points, lists)
    assert shares.sum() == lists
    assert (shares <= points).all()
    assert (np.abs(shares - points * lists / points.sum()) < 1).all()


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_few_distinct_keys_do_no_harm(two_levels: None, tmp_path: Path, distinct: int) -> None:
    """More lists than there are different keys: some stay empty, and everything is found."""
    world = make_codes(count=300, distinct=distinct)
    names = write_codes(tmp_path, world, 64)
    found = open_codes(tmp_path, world, names).search(world.keys[:2], 300)
    for at in range(2):
        check_answer(found, at, world, world.keys[at : at + 1], expected_entries(world))


def test_as_many_lists_as_points() -> None:
    world = make_codes(count=30)
    centroids = train_centroids(world.vectors, 30, seed=0)
    assert centroids.shape == (30, 16)
    assert np.isfinite(centroids).all()
