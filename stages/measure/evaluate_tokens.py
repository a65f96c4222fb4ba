"""How well retrieved tokens tell the true next one: distances, hits and likelihoods.

In: queries with their true next tokens, and what a search answered. Out: figures of one index, with
95 % intervals by resampling pictures. The mean distance by rank is the paper's Figure 6 (AR-RAG,
section 4): the k-th retrieved token's codebook row beside the true one's, against random codes; the
tokens of the corpus are the harder comparison, since frequent tokens lie close to many.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.daid import MERGES, Merge
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.specs import Floats
from arrag_runtime.search.neighbors import Neighbors
from stages.measure.certificate import recall_at
from stages.measure.confidence import mean_interval
from stages.measure.exact_search import Queries
from stages.measure.retrieved_distribution import (
    Probabilities,
    negative_log_likelihood,
    true_token_probability,
)
from stages.measure.sample_queries import halves

RANKS = 100
_RECALL_DEPTHS = (1, 10, 100)
TEMPERATURES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.9, 1.4, 2.0, 4.0)
BACKOFFS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
_LIKELIHOOD_MERGE: Merge = "sum"
"""The merge of the headline likelihood; the curves hold both."""


@dataclass(frozen=True)
class Measured:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TokenFigures:
    """What one index is worth on these queries."""

    recall: dict[str, Measured]
    """recall@k, by k as text."""
    token_distance: tuple[Measured, ...]
    """From the true token's code to the k-th retrieved one's, L2, for k = 1, 2, …"""
    hit_rate: tuple[Measured, ...]
    """How often the true token is among the first k, for k = 1, 2, …"""
    random_distance: Measured
    """Expected distance to a code drawn uniformly."""
    prior_distance: Measured
    """Expected distance to a token drawn from the corpus."""
    nll: Measured
    """Nats per token of (1 − ε) · p_ret + ε · p_prior, τ and ε chosen on the other pictures."""
    nll_temperature: float
    """τ, chosen on all pictures."""
    nll_backoff: float
    """ε, chosen on all pictures."""
    prior_nll: Measured
    """Nats per token of the corpus prior alone."""
    curves: dict[str, tuple[Measured, ...]]
    """By merge what `nll` is, at each of the temperatures."""
    queries: int
    pictures: int
    mean_results: float
    """Results per query."""
    nats: Probabilities = field(compare=False, repr=False)
    """float64 [Q], what `nll` is the mean of, by which indexes are compared query by query."""

    def to_json(self) -> dict[str, Any]:
        """The object that scripts read."""
        return {
            **{f"recall_at_{k}": found.mean for k, found in self.recall.items()},
            "recall_intervals": {k: _ends(found) for k, found in self.recall.items()},
            "token_distance": [found.mean for found in self.token_distance],
            "token_distance_intervals": [_ends(found) for found in self.token_distance],
            "random_distance": self.random_distance.mean,
            "prior_distance": self.prior_distance.mean,
            "prior_distance_interval": _ends(self.prior_distance),
            "hit_rate": [found.mean for found in self.hit_rate],
            "hit_rate_intervals": [_ends(found) for found in self.hit_rate],
            "nll": self.nll.mean,
            "nll_interval": _ends(self.nll),
            "nll_temperature": self.nll_temperature,
            "nll_backoff": self.nll_backoff,
            "nll_curves": {
                merge: [
                    {"temperature": temperature, "nll": found.mean, "interval": _ends(found)}
                    for temperature, found in zip(TEMPERATURES, curve, strict=True)
                ]
                for merge, curve in self.curves.items()
            },
            "prior_nll": self.prior_nll.mean,
            "prior_nll_interval": _ends(self.prior_nll),
            "queries": self.queries,
            "pictures": self.pictures,
            "mean_results": self.mean_results,
        }


def evaluate_tokens(
    queries: Queries,
    answer: Neighbors,
    exact: Neighbors,
    distances: Floats,
    codes: Floats,
    prior: Probabilities,
    *,
    seed: int = 0,
) -> TokenFigures:
    """The figures of one answer.

    exact: the nearest entries in the index's metric, at least 100 deep; distances: the true
    distances of the answers' first entries, float32 [Q, ≥ 100 where there are as many]; codes: the
    normalised codebook [V, d]; prior: float64 [V], a share for every token.
    """
    truth, images = queries.next_tokens, queries.images

    def each(columns: npt.NDArray[Any]) -> tuple[Measured, ...]:
        return _measured(columns, images, seed)

    def one(values: npt.NDArray[Any]) -> Measured:
        return each(values[:, None])[0]

    ranks = min(RANKS, answer.tokens.shape[1])
    real, tokens = answer.real[:, :ranks], answer.tokens[:, :ranks]
    apart = np.linalg.norm(codes[tokens] - codes[truth][:, None], axis=2)
    hits = np.logical_or.accumulate(real & (tokens == truth[:, None]), axis=1)
    squares = np.einsum("vd,vd->v", codes, codes)
    # The distance of each true token's code to every code, [Q, V].
    to_all = np.sqrt(np.maximum(squares[truth, None] + squares - 2 * codes[truth] @ codes.T, 0))
    own, fold = prior[truth], halves(images, seed)
    chances = {
        merge: true_token_probability(answer, truth, TEMPERATURES, merge) for merge in MERGES
    }
    best = _cross_fitted(chances[_LIKELIHOOD_MERGE], own, fold)
    at, backoff = _choose(chances[_LIKELIHOOD_MERGE], own)
    return TokenFigures(
        recall={
            str(k): one(recall_at(distances, answer.count, exact, k))
            for k in _RECALL_DEPTHS
            if k <= exact.tokens.shape[1]
        },
        token_distance=each(np.where(real, apart, np.nan)),
        hit_rate=each(hits.astype(np.float64)),
        random_distance=one(to_all.mean(axis=1)),
        prior_distance=one(to_all @ prior),
        nll=one(best),
        nll_temperature=TEMPERATURES[at],
        nll_backoff=backoff,
        prior_nll=one(-np.log(own)),
        curves={
            merge: each(np.stack([_cross_fitted(row[None], own, fold) for row in found], axis=1))
            for merge, found in chances.items()
        },
        queries=len(truth),
        pictures=len(np.unique(images)),
        mean_results=float(answer.count.mean()),
        nats=best,
    )


def likelihood_gain(
    other: TokenFigures, one: TokenFigures, images: Ids, *, seed: int = 0
) -> Measured:
    """By how many nats a token `one` is likelier than `other`, the same queries having been asked.

    images: int64 [Q]. The interval is of a paired bootstrap: above zero, `one` is the better.
    """
    [gain] = _measured((other.nats - one.nats)[:, None], images, seed)
    return gain


def _choose(chances: Probabilities, prior: Probabilities) -> tuple[int, float]:
    """The temperature (its place) and the back-off that suit queries best."""
    nats = negative_log_likelihood(chances[:, None], prior, np.array(BACKOFFS)[:, None])
    losses = nats.mean(axis=2)
    at, backoff = np.unravel_index(np.argmin(losses), losses.shape)
    return int(at), BACKOFFS[int(backoff)]


def _cross_fitted(
    chances: Probabilities, prior: Probabilities, fold: npt.NDArray[np.bool_]
) -> Probabilities:
    """Each query's negative log likelihood, temperature and back-off chosen on the other half.

    chances: p_ret of the true tokens at each temperature, [T, Q].
    """
    nats = np.empty(len(fold))
    for half in (fold, ~fold):
        other = ~half if (~half).any() else half
        at, backoff = _choose(chances[:, other], prior[other])
        nats[half] = negative_log_likelihood(chances[at, half], prior[half], backoff)
    return nats


def _measured(values: npt.NDArray[Any], images: Ids, seed: int) -> tuple[Measured, ...]:
    """The mean of each column [Q, C] and its interval."""
    columns = np.stack(mean_interval(values, images, seed=seed), axis=1)
    return tuple(Measured(*column) for column in columns.tolist())


def _ends(found: Measured) -> tuple[float, float]:
    return (found.low, found.high)
