"""Neighbors: padding, some of the queries, and a choice among several answers."""

from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import pytest

from arrag_runtime import Neighbors
from arrag_runtime.format.specs import squared_distances

COUNT = np.array([3, 0, 2])


@pytest.fixture
def found() -> Neighbors:
    """Three queries with room for four results each, and rubbish where there are fewer."""
    shape = (3, 4)
    distances = np.arange(12, dtype=np.float32).reshape(shape)
    tokens = np.full(shape, 7, np.uint16)
    return Neighbors.of(
        tokens,
        distances,
        np.full(shape, 5),
        COUNT,
        copies=np.full(shape, 2),
        places=np.full(shape, 1),
    )


def test_what_is_beyond_count_is_padding(found: Neighbors) -> None:
    """Whatever stood there; what is not given has its default in real results alone."""
    real = np.arange(4) < COUNT[:, None]
    assert np.array_equal(found.real, real)
    padding = {
        "tokens": 0,
        "distances": np.inf,
        "patch_ids": -1,
        "copies": 0,
        "places": -1,
        "weights": 0,
        "origin": 0,
    }
    assert {field.name for field in fields(Neighbors)} == {*padding, "count"}
    for name, value in padding.items():
        assert (getattr(found, name)[~real] == value).all(), name
    assert (found.copies[real] == 2).all()
    plain = Neighbors.of(found.tokens, found.distances, found.patch_ids, COUNT)
    assert (plain.copies == real).all()
    assert (plain.weights == real).all()
    assert (plain.places == -1).all()


@pytest.mark.parametrize("queries", [slice(1, 3), np.array([2, 0]), np.array([True, False, True])])
def test_some_of_the_queries(found: Neighbors, queries: slice | npt.NDArray[np.int64]) -> None:
    taken = found.take(queries)
    for field in fields(Neighbors):
        assert np.array_equal(getattr(taken, field.name), getattr(found, field.name)[queries])


def test_a_choice_among_answers(found: Neighbors) -> None:
    """Columns count through all answers; of real ones there are as many as were chosen."""
    other = replace(found, origin=found.real.astype(np.uint8))
    order = np.array([[4, 0, 5, 1, 2], [0, 1, 2, 3, 4], [0, 4, 1, 5, 2]])
    chosen = Neighbors.chosen([found, other], order)
    assert chosen.count.tolist() == [5, 0, 4]
    assert chosen.origin.tolist() == [[1, 0, 1, 0, 0], [0] * 5, [0, 1, 0, 1, 0]]
    assert chosen.distances[0].tolist() == [0, 0, 1, 1, 2]
    assert np.isinf(chosen.distances[1]).all()


def test_squared_distances_equal_a_loop() -> None:
    """Over the last axis, the others broadcast."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(5, 1, 3, 4)).astype(np.float32)
    other = rng.normal(size=(2, 3, 4)).astype(np.float32)
    squares = squared_distances(one, other)
    assert squares.shape == (5, 2, 3)
    for a, b, c in np.ndindex(5, 2, 3):
        loop = sum(
            (float(x) - float(y)) ** 2 for x, y in zip(one[a, 0, c], other[b, c], strict=True)
        )
        assert squares[a, b, c] == pytest.approx(loop, rel=1e-5)
