"""Retrieved distributions and intervals of means, against dictionaries and loops."""

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stages.measure.retrieved_distribution
from arrag_runtime.daid import MERGES, Merge
from arrag_runtime.search.neighbors import Neighbors
from stages.measure.confidence import mean_interval
from stages.measure.retrieved_distribution import (
    entry_shares,
    negative_log_likelihood,
    total_variation,
    true_token_probability,
)

VOCABULARY, K = 6, 12


def made_up(seed: int, queries: int = 7) -> Neighbors:
    """Answers of 0 to K results among few tokens, ties among them, and copies of each."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, K + 1, queries)
    count[0] = 0
    tokens = rng.integers(0, VOCABULARY, (queries, K)).astype(np.uint16)
    distances = np.sort(rng.integers(0, 9, (queries, K)) / 4, axis=1).astype(np.float32)
    beyond = np.arange(K) >= count[:, None]
    tokens[beyond], distances[beyond] = 0, np.inf
    ids = np.where(beyond, -1, 1)
    copies = rng.integers(1, 5, (queries, K))
    return Neighbors.of(tokens, distances, ids, count, copies=copies)


def alone(found: Neighbors) -> Neighbors:
    """The same, every result standing for itself."""
    return replace(found, copies=found.real.astype(np.int64))


def by_loop(found: Neighbors, row: int, temperature: float, merge: Merge) -> Any:
    """The distribution of one query as a dictionary."""
    mass: dict[int, float] = defaultdict(float)
    for at in range(int(found.count[row])):
        token = int(found.tokens[row, at])
        weight = math.exp(-float(found.distances[row, at]) / temperature)
        if merge == "sum":
            mass[token] += weight * int(found.copies[row, at])
        else:
            mass[token] = max(mass[token], weight)
    total = sum(mass.values())
    return {token: weight / total for token, weight in mass.items()}


@pytest.fixture(autouse=True, params=[1, 1 << 22])
def cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query at a time, and all at once."""
    monkeypatch.setattr(stages.measure.retrieved_distribution, "_CELLS", request.param)


@given(seed=st.integers(0, 2**32 - 1), merge=st.sampled_from(MERGES), with_copies=st.booleans())
def test_probabilities_equal_a_loop(seed: int, merge: Merge, with_copies: bool) -> None:
    """Of the true tokens at several temperatures; and how far two distributions are apart."""
    found = made_up(seed) if with_copies else alone(made_up(seed))
    other = alone(made_up(seed + 1))
    truth = (np.arange(7) % VOCABULARY).astype(np.uint16)
    temperatures = (0.05, 0.6, 3.0)
    chances = true_token_probability(found, truth, temperatures, merge)
    for at, temperature in enumerate(temperatures):
        apart = total_variation(found, other, temperature, merge)
        for row in range(7):
            mine = by_loop(found, row, temperature, merge)
            theirs = by_loop(other, row, temperature, merge)
            assert chances[at, row] == pytest.approx(mine.get(int(truth[row]), 0), abs=1e-5)
            both = {*mine, *theirs}
            expected = sum(abs(mine.get(v, 0) - theirs.get(v, 0)) for v in both) / 2
            if bool(mine) != bool(theirs):
                expected = 1.0
            assert apart[row] == pytest.approx(expected, abs=1e-5)


def test_a_distribution_is_at_no_distance_from_itself() -> None:
    """And at distance 1 from one of other tokens."""
    found = alone(made_up(3))
    assert total_variation(found, found, 0.6, "nearest").tolist() == [0] * 7
    other = replace(found, tokens=(found.tokens + VOCABULARY).astype(np.uint16))
    assert np.allclose(total_variation(found, other, 0.6, "sum"), found.count > 0)


def test_far_away_results_still_make_a_distribution() -> None:
    """Only differences of distances matter, so nothing vanishes or overflows."""
    found = alone(made_up(5))
    far = replace(found, distances=found.distances + np.float32(4096))
    truth = found.tokens[:, 0]
    near = true_token_probability(found, truth, [0.02], "sum")
    assert np.allclose(true_token_probability(far, truth, [0.02], "sum"), near, atol=1e-5)


def test_the_nearest_merge_counts_each_token_once() -> None:
    """The first result of a token counts, later ones and padding do not."""
    tokens = np.array([[3, 1, 3, 0, 1, 0]], np.uint16)
    distances = np.array([[0, 1, 1, 2, 3, np.inf]], np.float32)
    found = Neighbors.of(tokens, distances, tokens.astype(np.int64), np.array([5]))
    assert entry_shares(found, "nearest").tolist() == [[1, 1, 0, 1, 0, 0]]
    assert entry_shares(found, "sum").tolist() == [[1, 1, 1, 1, 1, 0]]
    twice = replace(found, copies=2 * found.copies)
    assert entry_shares(twice, "sum").tolist() == [[2, 2, 2, 2, 2, 0]]


def test_the_prior_answers_for_what_was_not_retrieved() -> None:
    nats = negative_log_likelihood(np.array([0.0, 0.5]), np.array([0.2, 0.1]), 0.25)
    assert nats.tolist() == pytest.approx([-math.log(0.05), -math.log(0.4)])


def test_an_interval_covers_the_mean_of_pictures() -> None:
    """The mean is over all values; draws are of pictures, so equal ones within make no certainty."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(50), 20)
    level = np.repeat(rng.normal(size=50), 20)
    noise = rng.normal(size=1000)
    values = np.stack([level, noise, level + 1, np.full(1000, np.nan)], axis=1)
    values[:10, 1] = np.nan
    mean, low, high = mean_interval(values, images)
    assert mean[0] == pytest.approx(level.mean())
    assert mean[1] == pytest.approx(noise[10:].mean())
    assert np.isnan([mean[3], low[3], high[3]]).all()
    by_pictures = 2 * 1.96 * level[::20].std() / math.sqrt(50)
    assert high[0] - low[0] == pytest.approx(by_pictures, rel=0.15)
    by_values = 2 * 1.96 * noise.std() / math.sqrt(1000)
    assert high[1] - low[1] == pytest.approx(by_values, rel=0.3)
    # Columns share their draws: a shifted column has a shifted interval.
    assert (low[2] - low[0], high[2] - high[0]) == (pytest.approx(1), pytest.approx(1))
    assert np.array_equal(mean_interval(values, images)[1], low, equal_nan=True)
    assert not np.array_equal(mean_interval(values, images, seed=1)[1], low, equal_nan=True)
