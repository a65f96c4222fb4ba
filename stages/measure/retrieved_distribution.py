"""From neighbours to a distribution of next tokens, and what it says of the true one.

Merging entries of the same token: "nearest" lets the nearest stand for all (AR-RAG's DAiD as
released), "sum" adds them up, each as often as it has copies (kNN-LM). Then
p_ret(v) ∝ Σ exp(−d / τ), zero for tokens that were not retrieved (AR-RAG, section 3.2). A share ε of
the probability goes to the corpus prior where a likelihood is asked for, or it would be infinite.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.ids import Ids

Merge = Literal["nearest", "sum"]
MERGES: tuple[Merge, ...] = ("nearest", "sum")
CELLS = 1 << 22
"""Cells of a dense block (queries × vocabulary, or queries × K) that are held at once."""

Probabilities = npt.NDArray[np.float64]


class Answer(Protocol):
    """What a search returns: tokens, distances, patch ids [Q, K], nearest first; count [Q]."""

    @property
    def tokens(self) -> npt.NDArray[np.uint16]: ...
    @property
    def distances(self) -> npt.NDArray[np.float32]: ...
    @property
    def patch_ids(self) -> Ids: ...
    @property
    def count(self) -> npt.NDArray[np.int64]: ...


def entry_shares(
    answer: Answer, merge: Merge, copies: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.float32]:
    """How often each result counts, float32 [Q, K]: 0 for padding, and for merged-away tokens.

    copies: int64 [Q, K], for how many identical entries a result stands; one each by default.
    """
    columns = np.arange(answer.tokens.shape[1])
    real = columns < answer.count[:, None]
    if merge == "sum":
        return np.where(real, 1 if copies is None else copies, 0).astype(np.float32)
    # Of the results of a token the first is the nearest; a stable sort brings it to the front.
    order = np.argsort(np.where(real, answer.tokens, 1 << 16), axis=1, kind="stable")
    ordered = np.take_along_axis(answer.tokens, order, axis=1)
    fresh = np.ones(order.shape, bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(fresh)
    np.put_along_axis(first, order, fresh, axis=1)
    return (first & real).astype(np.float32)


def true_token_probability(
    answer: Answer,
    truth: npt.NDArray[np.uint16],
    temperatures: Sequence[float],
    merge: Merge,
    copies: npt.NDArray[Any] | None = None,
) -> Probabilities:
    """p_ret of the true next tokens [Q] at each temperature: float64 [T, Q]; 0 without results."""
    found = np.zeros((len(temperatures), len(truth)))
    for rows in _chunks(len(truth), answer.tokens.shape[1]):
        part = _Rows(answer, rows)
        shares = entry_shares(part, merge, None if copies is None else copies[rows])
        hits = shares * (part.tokens == truth[rows, None])
        excess = _excess(part)
        for at, temperature in enumerate(temperatures):
            mass = np.exp(excess / -temperature)
            total = np.einsum("qk,qk->q", mass, shares, dtype=np.float64)
            hit = np.einsum("qk,qk->q", mass, hits, dtype=np.float64)
            found[at, rows] = hit / np.where(total > 0, total, 1)
    return found


def negative_log_likelihood(
    retrieved: Probabilities, prior: Probabilities, backoff: float
) -> Probabilities:
    """−ln((1 − ε) · p_ret + ε · p_prior) of true tokens, in nats, whose probabilities are given."""
    nats: Probabilities = -np.log((1 - backoff) * retrieved + backoff * prior)
    return nats


def total_variation(
    one: Answer,
    other: Answer,
    temperature: float,
    merge: Merge,
    copies: npt.NDArray[Any] | None = None,
) -> Probabilities:
    """½ Σ_v |p(v) − p'(v)| of the retrieved distributions of two answers, float64 [Q].

    copies: those of `one`. A query without results in one of them alone counts as 1.
    """
    count = len(one.count)
    distances = np.zeros(count)
    vocabulary = int(max(one.tokens.max(initial=0), other.tokens.max(initial=0))) + 1
    for rows in _chunks(count, vocabulary):
        mine = _dense(one, rows, vocabulary, temperature, merge, copies)
        theirs = _dense(other, rows, vocabulary, temperature, merge, None)
        distances[rows] = np.abs(mine - theirs).sum(axis=1) / 2
        missing = (one.count[rows] == 0) != (other.count[rows] == 0)
        distances[rows] = np.where(missing, 1.0, distances[rows])
    return distances


class _Rows:
    """Some rows of an answer."""

    def __init__(self, answer: Answer, rows: slice) -> None:
        self.tokens, self.distances = answer.tokens[rows], answer.distances[rows]
        self.patch_ids, self.count = answer.patch_ids[rows], answer.count[rows]


def _dense(
    answer: Answer,
    rows: slice,
    vocabulary: int,
    temperature: float,
    merge: Merge,
    copies: npt.NDArray[Any] | None,
) -> Probabilities:
    """The retrieved distributions of some queries, float64 [R, V]."""
    part = _Rows(answer, rows)
    shares = entry_shares(part, merge, None if copies is None else copies[rows])
    mass = np.exp(_excess(part).astype(np.float64) / -temperature) * shares
    cells = np.arange(len(part.count))[:, None] * vocabulary + part.tokens
    dense = np.bincount(cells.reshape(-1), mass.reshape(-1), len(part.count) * vocabulary)
    dense = dense.reshape(-1, vocabulary)
    probabilities: Probabilities = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1e-300)
    return probabilities


def _excess(part: Answer) -> npt.NDArray[np.float32]:
    """Distances beyond the nearest one, so that no exponential vanishes; 0 for padding."""
    real = np.arange(part.tokens.shape[1]) < part.count[:, None]
    with np.errstate(invalid="ignore"):
        return np.where(real, part.distances - part.distances[:, :1], 0).astype(np.float32)


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows so that rows × width stays within what is held at once."""
    step = max(1, CELLS // max(width, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
