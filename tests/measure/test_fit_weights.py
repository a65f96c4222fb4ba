"""Learned offset weights: what the data is made of comes out, and the gain is honest."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import patch_ids
from arrag_runtime.format.patches import PatchBlock
from arrag_runtime.format.specs import key_vectors
from stages.measure.exact_search import Queries
from stages.measure.fit_weights import (
    OffsetDistances,
    WeightSettings,
    corpus_prior,
    fit_weights,
    likelihood_loss,
)
from tests.worlds.patch_world import CODES, KEYS

SETTINGS = WeightSettings(k=64, rounds=3)


def scanned(pictures: int, seed: int, follow: float) -> npt.NDArray[np.uint16]:
    """Grids [N, 7, 7] in which a token mostly follows from the one to its left, or from none."""
    rng = np.random.default_rng(seed)
    grids = rng.integers(0, 24, (pictures, 7, 7)).astype(np.uint16)
    for col in range(1, 7):
        after = (grids[:, :, col - 1] * 5 + 1) % 24
        grids[:, :, col] = np.where(rng.random((pictures, 7)) < follow, after, grids[:, :, col])
    return grids


def entries_of(grids: npt.NDArray[np.uint16]) -> PatchBlock:
    """All patches of these grids; picture n has id n."""
    ids = patch_ids(
        np.arange(len(grids), dtype=np.int64), KEYS.neighborhood.positions(7, 7)
    ).reshape(-1)
    return PatchBlock(ids, KEYS.neighborhood.keys(grids).reshape(-1, 4), grids.reshape(-1))


def queries_of(entries: PatchBlock, pictures: range, step: int = 1) -> Queries:
    """Every `step`-th position of some pictures, each with its own picture excluded."""
    at = np.flatnonzero(np.isin(entries.patch_ids >> 10, pictures))[::step]
    images = entries.patch_ids[at] >> 10
    keys: npt.NDArray[np.uint16] = entries.keys[at]
    return Queries(keys, entries.next_tokens[at], images, images[:, None], "pictures set aside")


def test_the_neighbour_that_decides_gets_the_weight() -> None:
    """Where tokens follow from the left one alone, its weight and the gain are large."""
    entries = entries_of(scanned(60, 0, 0.9))
    fit, judge = queries_of(entries, range(20)), queries_of(entries, range(20, 40))
    found = fit_weights(entries, CODES, fit, judge, SETTINGS)
    assert np.mean(found.weights) == pytest.approx(1)
    assert found.weights[3] > 2 > 0.7 > max(found.weights[:3])
    assert found.gain_interval[0] > 0
    low, high = found.gain_interval
    assert 0.1 < low < found.gain < high
    assert found.gain == pytest.approx(found.equal - found.learned)
    assert found.learned < found.equal < found.prior + 0.05
    assert found.judged_on == "pictures set aside"
    again = fit_weights(entries, CODES, fit, judge, SETTINGS)
    assert again == found


def test_what_helps_nobody_is_said_to() -> None:
    """Tokens that follow from nothing: no gain beyond chance, and no claim of one."""
    entries = entries_of(scanned(40, 1, 0.0))
    found = fit_weights(
        entries, CODES, queries_of(entries, range(8)), queries_of(entries, range(8, 30)), SETTINGS
    )
    assert found.gain_interval[0] <= 0
    assert abs(found.gain) < 0.02
    assert found.equal == pytest.approx(found.prior, abs=0.05)


def test_the_own_picture_is_left_out() -> None:
    """Otherwise each query would find itself, and any weights would do."""
    entries = entries_of(scanned(30, 2, 0.0))
    fit, judge = queries_of(entries, range(8)), queries_of(entries, range(8, 16))
    blind = fit_weights(entries, CODES, fit, judge, SETTINGS)
    peeking = [replace(q, exclude=np.full_like(q.exclude, -1)) for q in (fit, judge)]
    seeing = fit_weights(entries, CODES, peeking[0], peeking[1], SETTINGS)
    assert seeing.learned < 1 < 2 < blind.learned


@pytest.mark.parametrize("latent", [False, True])
def test_slopes_equal_differences(latent: bool) -> None:
    """By every offset's rate and the back-off, for tokens and for latents, with padding."""
    entries = entries_of(scanned(6, 3, 0.5))
    if latent:
        vectors = key_vectors(entries.keys, CODES)
        noise = np.random.default_rng(0).normal(0, 0.1, vectors.shape)
        entries = replace(entries, keys=(vectors + noise).astype(np.float16))
        plain = entries_of(scanned(6, 3, 0.5))
        queries = queries_of(plain, range(6), 5)
    else:
        queries = queries_of(entries, range(6), 5)
    prior = corpus_prior(entries.next_tokens, 24)
    made = OffsetDistances.search(entries, CODES, queries, prior, (1.0,) * 4, 260)
    assert not made.real.all()
    rates, logit = np.array([0.7, 1.4, 0.2, 3.0]), -1.3
    # float32 distances, so the steps are wide and the comparison is of the third digit.
    value, slopes = likelihood_loss(made, rates, logit)
    for at in range(5):
        step = 0.02
        ends = []
        for sign in (1, -1):
            moved = np.log(rates)
            shifted = logit
            if at < 4:
                moved[at] += sign * step
            else:
                shifted += sign * step
            ends.append(likelihood_loss(made, np.exp(moved), shifted)[0])
        assert slopes[at] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=5e-3, abs=1e-5)
    assert value == pytest.approx(_by_loop(entries, queries, prior, rates, logit), abs=1e-4)


def _by_loop(entries: PatchBlock, queries: Queries, prior: Any, rates: Any, logit: float) -> float:
    """The mean negative log likelihood, an entry at a time, in float64."""
    vectors = key_vectors(entries.keys, CODES).astype(np.float64).reshape(-1, 4, 4)
    wide = key_vectors(queries.keys, CODES).astype(np.float64).reshape(-1, 4, 4)
    backoff = 1 / (1 + np.exp(-logit))
    losses = []
    for row, truth in enumerate(queries.next_tokens.tolist()):
        mine = (entries.patch_ids >> 10) != queries.images[row]
        mass = np.exp(-(((vectors[mine] - wide[row]) ** 2).sum(axis=2) @ rates))
        hit = entries.next_tokens[mine] == truth
        p = mass[hit].sum() / mass.sum()
        losses.append(-np.log((1 - backoff) * p + backoff * prior[truth]))
    return float(np.mean(losses))


def test_the_prior_gives_every_token_a_share() -> None:
    prior = corpus_prior(np.array([0, 0, 3], np.uint16), 5)
    assert prior.tolist() == pytest.approx([3 / 8, 1 / 8, 1 / 8, 2 / 8, 1 / 8])


def test_pictures_for_both_purposes_are_refused() -> None:
    """And so is having none."""
    entries = entries_of(scanned(4, 4, 0.5))
    both = queries_of(entries, range(2))
    with pytest.raises(BadInputError, match="2 in common"):
        fit_weights(entries, CODES, both, both, SETTINGS)
    none = queries_of(entries, range(0))
    with pytest.raises(BadInputError, match="not 2 and 0"):
        fit_weights(entries, CODES, both, none, SETTINGS)
