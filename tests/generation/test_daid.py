"""DAiD's mixing of probabilities, against loops that follow the paper's formula."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from arrag_runtime import Neighbors, daid
from arrag_runtime.format.errors import BadInputError

VOCABULARY, K = 30, 12


def retrieved(seed: int, counts: tuple[int, ...]) -> Neighbors:
    """Neighbours with repeated tokens and equal distances; padding as the index pads."""
    rng = np.random.default_rng(seed)
    shape = (len(counts), K)
    tokens = rng.integers(0, 8, shape).astype(np.uint16)
    distances = np.sort(np.round(rng.random(shape), 1), axis=1).astype(np.float32)
    return Neighbors.of(tokens, distances, rng.integers(0, 1 << 40, shape), np.array(counts))


def model_probabilities(seed: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator).softmax(dim=-1)


def by_loop(
    p: Any, found: Neighbors, lam: float, tau: float, merge: str
) -> npt.NDArray[np.float64]:
    """The formula, one entry at a time."""
    out: npt.NDArray[np.float64] = p.numpy().astype(np.float64)
    for row, count in enumerate(found.count.tolist()):
        if not count:
            continue
        weights: dict[int, float] = {}
        for token, distance in zip(
            found.tokens[row, :count], found.distances[row, :count], strict=True
        ):
            share = math.exp(-float(distance) / tau)
            if merge == "sum":
                weights[int(token)] = weights.get(int(token), 0.0) + share
            else:
                weights[int(token)] = max(weights.get(int(token), 0.0), share)
        total = sum(weights.values())
        out[row] *= 1 - lam
        for token, share in weights.items():
            out[row, token] += lam * share / total
    return out


@pytest.mark.parametrize("merge", daid.MERGES)
@pytest.mark.parametrize(("lam", "tau"), [(0.05, 0.6), (0.5, 0.05), (1.0, 3.0), (0.0, 0.6)])
def test_merging_follows_the_formula(merge: daid.Merge, lam: float, tau: float) -> None:
    """Every row by itself, rows with fewer or no neighbours among them."""
    p, found = model_probabilities(1, 4), retrieved(2, (K, 5, 0, 1))
    mixed = daid.merge(p, found, lam=lam, tau=tau, merge=merge)
    np.testing.assert_allclose(mixed.numpy(), by_loop(p, found, lam, tau, merge), atol=1e-6)
    np.testing.assert_allclose(mixed.sum(dim=1).numpy(), 1, atol=1e-5)


def test_nothing_retrieved_or_no_weight_leaves_every_bit_as_it_is() -> None:
    """λ = 0 mixes and changes nothing; so does a position without a neighbourhood."""
    p, found = model_probabilities(3, 2), retrieved(4, (K, 0))
    before = p.clone()
    assert torch.equal(daid.merge(p, found, lam=0.0), before)
    assert torch.equal(daid.merge(p, found, lam=0.0, merge="sum"), before)
    assert torch.equal(daid.merge(p, None), before)
    assert torch.equal(daid.merge(p, found)[1], before[1])
    assert torch.equal(p, before)


def test_a_batch_is_its_rows() -> None:
    """No row sees another's neighbours."""
    p, found = model_probabilities(5, 3), retrieved(6, (K, 3, 7))
    rows = [daid.merge(p[i : i + 1], found.take(slice(i, i + 1))) for i in range(3)]
    assert torch.equal(daid.merge(p, found), torch.cat(rows))


def test_an_entry_that_stands_for_several_counts_as_often() -> None:
    """Summing weighs it by its copies; the nearest of a token is the same however often it occurs."""
    p, found = model_probabilities(10, 2), retrieved(11, (4, 2))
    copies = np.array([[3, 1, 2, 1, *[0] * 8], [1, 5, *[0] * 10]])
    once = replace(found, copies=copies)
    repeated: list[Any] = [
        np.stack([np.resize(np.repeat(row, n), 8) for row, n in zip(values, copies, strict=True)])
        for values in (found.tokens, found.distances, found.patch_ids)
    ]
    often = Neighbors.of(repeated[0], repeated[1], repeated[2], copies.sum(axis=1))
    for merge in daid.MERGES:
        torch.testing.assert_close(
            daid.merge(p, once, merge=merge), daid.merge(p, often, merge=merge)
        )
    assert not torch.equal(daid.merge(p, once, merge="sum"), daid.merge(p, found, merge="sum"))


def test_an_entry_counts_for_the_weight_of_its_database() -> None:
    """Twice the weight is twice the entry; no weight is no entry."""
    p, found = model_probabilities(12, 1), retrieved(13, (6,))
    weights = np.array([[2, 0, 1, 1, 2, 0, *[0] * 6]], np.float32)
    weighed = replace(found, weights=weights)
    at = np.array([[0, 0, 2, 3, 4, 4]])
    taken: list[Any] = [
        np.take_along_axis(np.asarray(values), at, axis=1)
        for values in (found.tokens, found.distances, found.patch_ids)
    ]
    doubled = Neighbors.of(taken[0], taken[1], taken[2], np.array([6]))
    torch.testing.assert_close(
        daid.merge(p, weighed, merge="sum"), daid.merge(p, doubled, merge="sum")
    )
    shares: dict[int, float] = {}
    for token, distance, weight in zip(
        found.tokens[0, :6].tolist(), found.distances[0, :6].tolist(), weights[0, :6], strict=True
    ):
        if weight:
            share = weight * math.exp(-distance / daid.TAU)
            shares[token] = max(shares.get(token, 0.0), float(share))
    wanted = 0.95 * p.double().numpy()
    for token, share in shares.items():
        wanted[0, token] += 0.05 * share / sum(shares.values())
    np.testing.assert_allclose(daid.merge(p, weighed).numpy(), wanted, atol=1e-6)
    nothing = replace(found, weights=np.zeros_like(found.weights))
    assert torch.equal(daid.merge(p, nothing), p)


def test_padding_is_never_mixed_in() -> None:
    """Whatever stands beyond `count`, here a near token with a good distance, changes nothing."""
    p, found = model_probabilities(7, 1), retrieved(8, (4,))
    tokens, distances = found.tokens.copy(), found.distances.copy()
    tokens[0, 4:], distances[0, 4:] = 29, 0.0
    weights, copies = np.ones_like(found.weights), np.where(found.copies > 0, found.copies, 9)
    dirty = replace(found, tokens=tokens, distances=distances, weights=weights, copies=copies)
    for merge in daid.MERGES:
        assert torch.equal(daid.merge(p, dirty, merge=merge), daid.merge(p, found, merge=merge))


def test_the_entropy_bound_mixes_only_unsure_rows() -> None:
    """Rows whose own entropy is not above the bound stay as they are."""
    flat, sharp = torch.zeros(1, VOCABULARY), torch.zeros(1, VOCABULARY)
    sharp[0, 3] = 12.0
    p, found = torch.cat([flat, sharp]).softmax(dim=-1), retrieved(9, (K, K))
    mixed = daid.mix(p, found, daid.DaidSettings(entropy_above=1.0))
    assert torch.equal(mixed[1], p[1])
    assert torch.equal(mixed[0], daid.merge(p, found)[0])
    by_hand = [-sum(x * math.log(x) for x in row) for row in p.double().tolist()]
    np.testing.assert_allclose(daid.entropy(p).numpy(), by_hand, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: daid.DaidSettings(lam=1.5), r"λ is 1.5; .*0\.\.1"),
        (lambda: daid.DaidSettings(lam=-0.1), r"λ is -0.1; .*0\.\.1"),
        (lambda: daid.DaidSettings(lam=float("nan")), "λ is nan"),
        (lambda: daid.DaidSettings(tau=0.0), "τ is 0.0; .*above 0"),
        (
            lambda: daid.DaidSettings(merge="best"),  # type: ignore[arg-type]
            "unknown merge 'best'; .*nearest, sum",
        ),
        (
            lambda: daid.merge(model_probabilities(1, 2), retrieved(1, (3,))),
            "neighbours of 1 positions for probabilities of 2",
        ),
    ],
)
def test_settings_out_of_range_are_refused(wrong: Callable[[], Any], message: str) -> None:
    """One line with the value seen."""
    with pytest.raises(BadInputError, match=message):
        wrong()
