"""Neighbourhoods against plain loops: whole grids, single positions, both borders."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.neighborhood import (
    BORDERS,
    CAUSAL_1,
    CAUSAL_2,
    MISSING,
    NEIGHBORHOODS,
    SURROUND_1,
    Neighborhood,
    causal,
    neighborhood,
)

HOODS = [neighborhood(name, border) for name in NEIGHBORHOODS for border in BORDERS]
CAUSAL = [hood for hood in HOODS if hood.name.startswith("causal")]
sides = st.integers(1, 7)
batches = st.integers(0, 3)
seeds = st.integers(0, 2**32 - 1)
every_hood = pytest.mark.parametrize("hood", HOODS, ids=lambda hood: f"{hood.name}-{hood.border}")


def token_grids(seed: int, batch: int, height: int, width: int) -> npt.NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, MISSING, (batch, height, width)).astype(np.uint16)


def vector_grids(seed: int, batch: int, height: int, width: int) -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, height, width, 3)).astype(np.float16)


def key_by_loop(
    hood: Neighborhood, grid: Any, row: int, col: int, missing: Any
) -> list[Any] | None:
    """The key of one position of one grid by asking for every neighbour in turn."""
    key = []
    for down, right in hood.offsets:
        if 0 <= row + down < grid.shape[0] and 0 <= col + right < grid.shape[1]:
            key.append(grid[row + down, col + right])
        elif hood.border == "skip":
            return None
        else:
            key.append(missing)
    return key


def check_against_loops(hood: Neighborhood, grids: Any, missing: Any) -> None:
    """`positions`, `keys` and `key_at` agree with the loop at every position."""
    height, width = grids.shape[1:3]
    positions = hood.positions(height, width).tolist()
    keys = hood.keys(grids)
    assert keys.shape == (len(grids), len(positions), hood.size, *grids.shape[3:])
    assert keys.dtype == grids.dtype
    with_key: list[int] = []
    for row in range(height):
        for col in range(width):
            single = hood.key_at(grids, row, col)
            expected = [key_by_loop(hood, grid, row, col, missing) for grid in grids]
            probe = key_by_loop(hood, np.empty((height, width)), row, col, 0)
            if probe is None:
                assert single is None
                continue
            at = len(with_key)
            with_key.append(row * width + col)
            assert single is not None
            assert np.array_equal(single, keys[:, at])
            if len(grids):
                assert np.array_equal(single, np.array(expected, dtype=grids.dtype))
    assert positions == with_key


@every_hood
@given(seed=seeds, batch=batches, height=sides, width=sides)
def test_token_keys_equal_a_loop(
    hood: Neighborhood, seed: int, batch: int, height: int, width: int
) -> None:
    """Token keys hold the neighbours in the order of the offsets, MISSING where there is none."""
    check_against_loops(hood, token_grids(seed, batch, height, width), MISSING)


@every_hood
@given(seed=seeds, batch=batches, height=sides, width=sides)
def test_vector_keys_equal_a_loop(
    hood: Neighborhood, seed: int, batch: int, height: int, width: int
) -> None:
    """Vector keys hold the neighbours' vectors, a zero vector where there is none."""
    check_against_loops(hood, vector_grids(seed, batch, height, width), np.zeros(3))


@pytest.mark.parametrize("hood", CAUSAL, ids=lambda hood: f"{hood.name}-{hood.border}")
@given(seed=seeds, height=sides, width=sides, data=st.data())
def test_a_causal_key_reads_nothing_from_its_position_on(
    hood: Neighborhood, seed: int, height: int, width: int, data: st.DataObject
) -> None:
    """Tokens at and after the position may be anything: the key stays."""
    grids = token_grids(seed, 2, height, width)
    at = data.draw(st.integers(0, height * width - 1))
    before = hood.key_at(grids, *divmod(at, width))
    changed = grids.copy().reshape(2, -1)
    changed[:, at:] = token_grids(seed + 1, 2, height, width).reshape(2, -1)[:, at:]
    after = hood.key_at(changed.reshape(grids.shape), *divmod(at, width))
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert np.array_equal(before, after)


@every_hood
def test_is_causal_says_whether_a_key_needs_later_tokens(hood: Neighborhood) -> None:
    """Only the surrounding neighbourhood changes its key with the tokens that come later."""
    grids = token_grids(0, 1, 7, 7)
    later = grids.copy()
    later[:, 4:] = 1
    key, other = hood.key_at(grids, 3, 3), hood.key_at(later, 3, 3)
    assert key is not None
    assert other is not None
    assert hood.is_causal == np.array_equal(key, other) == hood.name.startswith("causal")


@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (1, -1)])
def test_one_offset_at_or_after_the_position_is_not_causal(offset: tuple[int, int]) -> None:
    """A neighbourhood is causal when all of its offsets come before, not when most do."""
    assert Neighborhood("own", ((-1, 5), (0, -1))).is_causal
    assert not Neighborhood("own", ((-1, 0), offset)).is_causal


def test_causal_1_is_the_released_shape() -> None:
    """Offsets in the order keys are stored in; 506 positions of a 24x24 grid have all four."""
    assert CAUSAL_1.offsets == ((-1, -1), (-1, 0), (-1, 1), (0, -1))
    rows, cols = np.divmod(CAUSAL_1.positions(24, 24), 24)
    assert len(rows) == 506
    assert sorted(set(rows.tolist())) == list(range(1, 24))
    assert sorted(set(cols.tolist())) == list(range(1, 23))
    assert len(neighborhood("causal-1", "zero").positions(24, 24)) == 576


def test_the_other_shapes_are_in_reading_order() -> None:
    """causal-2 has two rows of five above and two to the left; surround-1 the eight around."""
    above = [(row, col) for row in (-2, -1) for col in (-2, -1, 0, 1, 2)]
    assert CAUSAL_2.offsets == (*above, (0, -2), (0, -1))
    around = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
    assert SURROUND_1.offsets == around
    assert [causal(hops).size for hops in (1, 2, 3)] == [4, 12, 24]


@every_hood
@pytest.mark.parametrize("at", [(-1, 0), (0, -1), (3, 0), (0, 5), (3, 5)])
def test_a_position_outside_the_grid_is_refused(hood: Neighborhood, at: tuple[int, int]) -> None:
    """The message names the position and what is allowed; nothing wraps around."""
    with pytest.raises(BadInputError, match=r"outside the 3x5 grid.*0\.\.2.*0\.\.4"):
        hood.key_at(token_grids(0, 1, 3, 5), *at)


def test_unknown_names_are_refused_with_the_choices() -> None:
    """A wrong neighbourhood or border names what there is."""
    with pytest.raises(BadInputError, match=r"'casual-1'.*causal-1, causal-2, surround-1"):
        neighborhood("casual-1")
    with pytest.raises(BadInputError, match=r"'wrap'.*skip, zero"):
        neighborhood("causal-1", "wrap")
