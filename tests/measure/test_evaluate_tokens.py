"""Figures of an evaluation against loops, and the drawing made of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from arrag_runtime.format.ids import split_patch_ids
from arrag_runtime.search.neighbors import Neighbors
from stages.measure.evaluate_tokens import (
    BACKOFFS,
    TEMPERATURES,
    TokenFigures,
    evaluate_tokens,
    likelihood_gain,
)
from stages.measure.exact_search import Queries, exact_search
from stages.measure.fit_weights import corpus_prior
from stages.measure.plot_evaluation import draw_evaluation
from stages.measure.sample_queries import halves
from tests.worlds.patch_world import CODES, World, make_world
from tests.worlds.plain_search import PlainSearch

K = 800


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("db"), 2, 8)


@pytest.fixture(scope="module")
def queries(world: World) -> Queries:
    at = np.arange(0, len(world.ids), 9)
    images = split_patch_ids(world.ids[at])[0]
    return Queries(world.keys[at], world.tokens[at], images, images[:, None], "test")


@pytest.fixture(scope="module")
def exact(world: World, queries: Queries) -> Neighbors:
    return exact_search(world.table.blocks(), CODES, queries, 100)


@pytest.fixture(scope="module")
def answer(world: World, queries: Queries) -> Neighbors:
    """All entries but the own picture's: fewer than K."""
    return PlainSearch(world, "Flat").search(queries.keys, K, exclude=queries.exclude)


@pytest.fixture(scope="module")
def figures(world: World, queries: Queries, exact: Neighbors, answer: Neighbors) -> TokenFigures:
    prior = corpus_prior(world.tokens, 24)
    return evaluate_tokens(queries, answer, exact, answer.distances[:, :100], CODES, prior)


def test_distances_and_hits_equal_loops(
    world: World, queries: Queries, answer: Neighbors, figures: TokenFigures
) -> None:
    """By rank; the distances to random codes and corpus tokens are expectations, not draws."""
    assert len(figures.token_distance) == len(figures.hit_rate) == 100
    prior = corpus_prior(world.tokens, 24)
    rows = range(len(queries.keys))
    for k in (1, 2, 50, 100):
        apart = [
            np.linalg.norm(CODES[answer.tokens[row, k - 1]] - CODES[queries.next_tokens[row]])
            for row in rows
        ]
        assert figures.token_distance[k - 1].mean == pytest.approx(np.mean(apart), abs=1e-5)
        hit = [queries.next_tokens[row] in answer.tokens[row, :k] for row in rows]
        assert figures.hit_rate[k - 1].mean == pytest.approx(np.mean(hit))
    to_all = [[np.linalg.norm(CODES[v] - CODES[t]) for v in range(24)] for t in queries.next_tokens]
    assert figures.random_distance.mean == pytest.approx(np.mean(to_all), abs=1e-5)
    expected = np.mean(np.array(to_all) @ prior)
    assert figures.prior_distance.mean == pytest.approx(expected, abs=1e-5)
    assert figures.prior_nll.mean == pytest.approx(np.mean(-np.log(prior[queries.next_tokens])))
    for measured in (*figures.token_distance, figures.nll, figures.prior_distance):
        assert measured.low <= measured.mean <= measured.high
    assert (figures.queries, figures.pictures) == (len(rows), 16)
    assert figures.mean_results == 15 * 49


def test_an_exact_search_recalls_everything(figures: TokenFigures) -> None:
    assert {k: found.mean for k, found in figures.recall.items()} == {"1": 1, "10": 1, "100": 1}


def test_likelihoods_are_chosen_on_the_other_half(
    world: World, queries: Queries, answer: Neighbors, figures: TokenFigures
) -> None:
    """Temperature and back-off come from pictures that are not judged; by a loop over a grid."""
    prior = corpus_prior(world.tokens, 24)
    first = halves(queries.images, 0)
    assert not set(queries.images[first]) & set(queries.images[~first])
    chance = {}
    for temperature in TEMPERATURES:
        column = []
        for row, truth in enumerate(queries.next_tokens.tolist()):
            count = int(answer.count[row])
            mass = np.exp(-answer.distances[row, :count].astype(np.float64) / temperature)
            column.append(mass[answer.tokens[row, :count] == truth].sum() / mass.sum())
        chance[temperature] = np.array(column)
    own = prior[queries.next_tokens]

    def nats(temperature: float, backoff: float) -> npt.NDArray[np.float64]:
        return np.asarray(-np.log((1 - backoff) * chance[temperature] + backoff * own))

    settings = [(t, e) for t in TEMPERATURES for e in BACKOFFS]
    expected = np.empty(len(own))
    for half in (first, ~first):
        best = min(settings, key=lambda setting: nats(*setting)[~half].mean())
        expected[half] = nats(*best)[half]
    assert figures.nll.mean == pytest.approx(expected.mean(), abs=1e-4)
    best = min(settings, key=lambda setting: nats(*setting).mean())
    assert (figures.nll_temperature, figures.nll_backoff) == best
    for at, temperature in enumerate(TEMPERATURES):
        for half in (first, ~first):
            one = min(BACKOFFS, key=lambda e, t=temperature: nats(t, e)[~half].mean())  # type: ignore[misc]
            expected[half] = nats(temperature, one)[half]
        assert figures.curves["sum"][at].mean == pytest.approx(expected.mean(), abs=1e-4)


def test_copies_count_in_the_sum_alone(
    world: World, queries: Queries, exact: Neighbors, answer: Neighbors, figures: TokenFigures
) -> None:
    """A result that stands for five is as likely as five; the nearest merge does not care."""
    prior = corpus_prior(world.tokens, 24)
    copies = np.where(answer.tokens == queries.next_tokens[:, None], 5, 1)
    often = replace(answer, copies=copies)
    counted = evaluate_tokens(queries, often, exact, answer.distances[:, :100], CODES, prior)
    assert counted.curves["nearest"] == figures.curves["nearest"]
    assert counted.nll.mean < figures.nll.mean
    gain = likelihood_gain(figures, counted, queries.images)
    assert gain.mean == pytest.approx(figures.nll.mean - counted.nll.mean)
    assert 0 < gain.low < gain.mean < gain.high
    # Pairing matters: the difference is better known than either.
    assert gain.high - gain.low < figures.nll.high - figures.nll.low
    none = likelihood_gain(figures, figures, queries.images)
    assert (none.low, none.mean, none.high) == (0, 0, 0)


def test_results_that_are_missing_count_as_none(world: World, queries: Queries) -> None:
    """Beyond a query's count there is no token, whatever stands in the arrays."""
    found = PlainSearch(world, "Flat").search(queries.keys, 20, exclude=queries.exclude)
    found.count[1:] = 0
    found.tokens[1:] = queries.next_tokens[1:, None]
    exact = exact_search(world.table.blocks(), CODES, queries, 100)
    prior = corpus_prior(world.tokens, 24)
    figures = evaluate_tokens(queries, found, exact, found.distances, CODES, prior)
    apart = np.linalg.norm(CODES[found.tokens[0, 0]] - CODES[queries.next_tokens[0]])
    assert figures.token_distance[0].mean == pytest.approx(apart, abs=1e-6)
    assert len(figures.token_distance) == 20
    assert figures.hit_rate[-1].mean <= 1 / len(queries.keys)
    assert figures.recall["10"].mean == pytest.approx(1 / len(queries.keys))


def test_figures_become_json_with_the_promised_keys(figures: TokenFigures) -> None:
    fields = json.loads(json.dumps(figures.to_json()))
    promised = {"recall_at_1", "recall_at_10", "recall_at_100", "token_distance"}
    promised |= {"random_distance", "prior_distance", "nll", "nll_interval"}
    assert promised <= fields.keys()
    assert len(fields["token_distance"]) == 100
    assert fields["nll_interval"][0] <= fields["nll"] <= fields["nll_interval"][1]
    assert math.isfinite(sum(point["nll"] for point in fields["nll_curves"]["nearest"]))


def test_the_drawing_is_a_picture_of_both_panels(figures: TokenFigures, tmp_path: Path) -> None:
    """A PNG in a folder that it makes; each index in a colour of its own, in both halves."""
    path = tmp_path / "new" / "plot.png"
    draw_evaluation([("one", figures), ("two", figures)], "a title", path)
    assert [p.name for p in path.parent.iterdir()] == ["plot.png"]
    drawn = np.asarray(Image.open(path).convert("RGB"))
    half = drawn.shape[1] // 2
    # The second of two equal lines lies over the first; what is drawn last is seen.
    apart = np.abs(drawn.astype(int) - np.array((213, 94, 0)))
    orange = (apart < 12).all(axis=2)
    assert orange[:, :half].any()
    assert orange[:, half:].any()


@pytest.mark.parametrize("pictures", [1, 2, 7])
def test_halves_split_pictures(pictures: int) -> None:
    """Never a picture in both, unless there is but one; both have some."""
    images = np.repeat(np.arange(pictures), 10)
    first = halves(images, 3)
    assert first.any()
    assert not first.all()
    assert np.array_equal(halves(images, 3), first)
    if pictures > 1:
        assert not set(images[first]) & set(images[~first])
