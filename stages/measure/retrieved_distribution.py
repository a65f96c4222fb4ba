"""From neighbours to a distribution of next tokens, and what it says of the true one.

Merging entries of the same token: "nearest" lets the nearest stand for all (AR-RAG's DAiD as
released), "sum" adds them up, each as often as it has copies (kNN-LM). Then
p_ret(v) ∝ Σ exp(−d / τ), zero for tokens that were not retrieved (AR-RAG, section 3.2). A share ε
of the probability goes to the corpus prior where a likelihood is asked for, or it would be infinite.

`arrag_runtime.daid` makes the same distribution for a decode loop: a few rows, whole, as tensors.
Here thousands of queries are asked of a few tokens at many temperatures, so most is never made.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from arrag_runtime.daid import Merge, entry_weights
from arrag_runtime.search.neighbors import Neighbors

_CELLS = 1 << 22
"""Cells of a dense block (queries × vocabulary, or queries × K) that are held at once."""
Probabilities = npt.NDArray[np.float64]


def entry_shares(answer: Neighbors, merge: Merge) -> npt.NDArray[np.float32]:
    """How often each result counts, float32 [Q, K]: 0 for padding, and for merged-away tokens.

    Of one database: where weights differ, the nearest of a token need not be the one that counts.
    """
    weights = entry_weights(answer, merge)
    if merge == "sum":
        return weights.astype(np.float32)
    # Of the results of a token the first is the nearest; a stable sort brings it to the front.
    order = np.argsort(np.where(answer.real, answer.tokens, 1 << 16), axis=1, kind="stable")
    ordered = np.take_along_axis(answer.tokens, order, axis=1)
    fresh = np.ones(order.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(fresh)
    np.put_along_axis(first, order, fresh, axis=1)
    return np.where(first, weights, 0).astype(np.float32)


def true_token_probability(
    answer: Neighbors, truth: npt.NDArray[np.uint16], temperatures: Sequence[float], merge: Merge
) -> Probabilities:
    """p_ret of the true next tokens [Q] at each temperature: float64 [T, Q]; 0 without results."""
    found = np.zeros((len(temperatures), len(truth)))
    for rows in _chunks(len(truth), answer.tokens.shape[1]):
        part = answer.take(rows)
        shares = entry_shares(part, merge)
        hits = shares * (part.tokens == truth[rows, None])
        excess = _excess(part)
        for at, temperature in enumerate(temperatures):
            mass = np.exp(excess / -temperature)
            total = np.einsum("qk,qk->q", mass, shares, dtype=np.float64)
            hit = np.einsum("qk,qk->q", mass, hits, dtype=np.float64)
            found[at, rows] = hit / np.where(total > 0, total, 1)
    return found


def negative_log_likelihood(
    retrieved: Probabilities, prior: Probabilities, backoff: float | Probabilities
) -> Probabilities:
    """−ln((1 − ε) · p_ret + ε · p_prior) of true tokens, in nats, whose probabilities are given."""
    nats: Probabilities = -np.log((1 - backoff) * retrieved + backoff * prior)
    return nats


def total_variation(
    one: Neighbors, other: Neighbors, temperature: float, merge: Merge
) -> Probabilities:
    """½ Σ_v |p(v) − p'(v)| of the retrieved distributions of two answers, float64 [Q].

    A query without results in one of them alone counts as 1.
    """
    distances = np.zeros(len(one.count))
    vocabulary = int(max(one.tokens.max(initial=0), other.tokens.max(initial=0))) + 1
    for rows in _chunks(len(distances), vocabulary):
        mine = _dense(one.take(rows), vocabulary, temperature, merge)
        theirs = _dense(other.take(rows), vocabulary, temperature, merge)
        distances[rows] = np.abs(mine - theirs).sum(axis=1) / 2
    distances[(one.count == 0) != (other.count == 0)] = 1
    return distances


def _dense(answer: Neighbors, vocabulary: int, temperature: float, merge: Merge) -> Probabilities:
    """The retrieved distributions, float64 [Q, V]."""
    mass = np.exp(_excess(answer).astype(np.float64) / -temperature) * entry_shares(answer, merge)
    count = len(answer.count)
    cells = np.arange(count)[:, None] * vocabulary + answer.tokens
    dense = np.bincount(cells.ravel(), mass.ravel(), count * vocabulary).reshape(count, vocabulary)
    probabilities: Probabilities = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1e-300)
    return probabilities


def _excess(answer: Neighbors) -> npt.NDArray[np.float32]:
    """Distances beyond the nearest one, so that no exponential vanishes; 0 for padding."""
    with np.errstate(invalid="ignore"):
        beyond = answer.distances - answer.distances[:, :1]
    return np.where(answer.real, beyond, 0).astype(np.float32)


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows so that rows × width stays within what is held at once."""
    step = max(1, _CELLS // max(width, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
