"""Which neighbours tell most of the next token: weights of the offsets, learned from a database.

In: entries and queries sampled from the database itself. Out: weights w_o of mean 1, a temperature
τ and a share ε of the corpus prior, which together make the true next tokens likeliest: the mean of
−ln((1 − ε) · p_ret + ε · p_prior) is minimised, where the query's own picture and its copies are
left out and p_ret merges by sum,

    p_ret(v) ∝ Σ_{k: token v} exp(−Σ_o (w_o / τ) · ‖q_o − k_o‖²).

How: the candidates of each query are searched exactly under the current weights, then the rates w_o
/ τ and ε are fitted to them by L-BFGS with the analytic gradient, in the logarithms of the rates
and the logit of ε; then the candidates are searched again, and so on for a few rounds, since
weights change who the candidates are. Equal weights get their own τ and ε. What is reported comes
from pictures that were used for neither fit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, logit

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.patches import PatchBlock, PatchTable
from arrag_runtime.format.specs import (
    Floats,
    KeySpec,
    TokenizerSpec,
    key_vectors,
    squared_distances,
)
from stages.measure.confidence import mean_interval
from stages.measure.exact_search import Queries, exact_search
from stages.measure.retrieved_distribution import (
    Probabilities,
    negative_log_likelihood,
    true_token_probability,
)
from stages.measure.sample_queries import halves, sample_queries

_SETTLED = 0.02
"""Rounds end when no weight changes by more."""
_RATES = (1e-3, 1e3)
"""Bounds on an offset's weight by temperature."""
_BACKOFFS = (1e-4, 0.95)
"""Bounds on the share of the prior."""
_QUERIES_AT_ONCE = 64
"""Queries whose candidates are held as vectors at once."""
_Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WeightSettings:
    """How much is sampled, and how long it is fitted."""

    entries: int = 1_000_000
    """Entries of the table to retrieve from."""
    pictures: int = 300
    """Pictures that queries are from, for the fit and again for judging."""
    queries: int = 2000
    """Positions of these pictures, for the fit and again for judging."""
    k: int = 2048
    """Candidates per query, as many as DAiD retrieves: fewer leave much of the likelihood out."""
    rounds: int = 4
    """At most so many."""
    seed: int = 0


@dataclass(frozen=True)
class RateFit:
    """What is fitted: the offsets' weights by temperature, and the share of the prior."""

    rates: _Values
    """w_o / τ, float64 [n]."""
    backoff: float
    """ε."""

    @property
    def temperature(self) -> float:
        """τ, with which the weights have a mean of 1."""
        return float(1 / self.rates.mean())

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of mean 1."""
        return tuple(float(w) for w in self.rates / self.rates.mean())


@dataclass(frozen=True)
class FittedWeights:
    """The outcome. Likelihoods are in nats per token, on pictures used for neither fit."""

    weights: tuple[float, ...]
    """One per offset, of mean 1."""
    temperature: float
    """τ with these weights."""
    backoff: float
    """ε with these weights."""
    equal_temperature: float
    """τ with equal weights."""
    equal_backoff: float
    """ε with equal weights."""
    equal: float
    """Mean negative log likelihood with equal weights, their temperature and back-off."""
    learned: float
    """Mean negative log likelihood with `weights`, their temperature and back-off."""
    gain: float
    """equal − learned."""
    gain_interval: tuple[float, float]
    """The ends of its 95 % interval, by a paired bootstrap over pictures."""
    prior: float
    """Mean negative log likelihood under the corpus prior alone."""
    rounds: int
    """How often the candidates were fitted."""
    entries: int
    """How many were retrieved from."""
    queries: int
    """How many were fitted to."""
    judged_on: str
    """What the likelihoods are of, in words."""


def corpus_prior(next_tokens: npt.NDArray[np.uint16], vocabulary: int) -> Probabilities:
    """The share of each token float64 [V], every one counted once more, so that none is 0."""
    counts = np.bincount(next_tokens, minlength=vocabulary) + 1.0
    prior: Probabilities = counts / counts.sum()
    return prior


def learn_weights(
    table: PatchTable,
    images: ImageTable,
    spec: TokenizerSpec,
    keys: KeySpec,
    codes: Floats,
    left_out: Ids,
    settings: WeightSettings,
    progress: Callable[[str], None] = lambda _step: None,
) -> FittedWeights:
    """`fit_weights` with samples of a database, the pictures being its own.

    left_out: ids of pictures, ascending, whose patches count for nothing.
    """
    asked = sample_queries(
        images,
        spec,
        keys,
        pictures=2 * settings.pictures,
        queries=2 * settings.queries,
        seed=settings.seed,
        split="database",
    )
    chosen = halves(asked.images, settings.seed)
    others = len(np.unique(asked.images[~chosen]))
    judged_on = f"{np.count_nonzero(~chosen)} queries from {others} pictures that were not used"
    judge = replace(asked.take(~chosen), protocol=judged_on)
    drawn = table.sample(settings.entries, seed=settings.seed)
    entries = drawn.take(~contains(left_out, split_patch_ids(drawn.patch_ids)[0]))
    return fit_weights(entries, codes, asked.take(chosen), judge, settings, progress)


def fit_weights(
    entries: PatchBlock,
    codes: Floats,
    fit: Queries,
    judge: Queries,
    settings: WeightSettings,
    progress: Callable[[str], None] = lambda _step: None,
) -> FittedWeights:
    """Fit the offsets' weights.

    entries: a uniform sample of the table, in memory; codes: the normalised codebook [V, d];
    fit, judge: queries of disjoint pictures. Raises BadInputError where they are not, or too few.
    """
    shared = np.intersect1d(fit.images, judge.images)
    if len(shared) or not len(fit.keys) or not len(judge.keys) or not len(entries.keys):
        raise BadInputError(
            f"learning weights needs entries and pictures to fit and others to judge by, not"
            f" {len(np.unique(fit.images))} and {len(np.unique(judge.images))} with {len(shared)}"
            " in common; use --weights equal, or a larger database"
        )
    prior = corpus_prior(entries.next_tokens, len(codes))
    equal = weights = (1.0,) * fit.keys.shape[1]
    progress("equal weights")
    candidates = OffsetDistances.search(entries, codes, fit, prior, equal, settings.k)
    fitted = plain = _fit_temperature(candidates, equal)
    done = 0
    for done in range(1, settings.rounds + 1):
        progress(f"round {done}")
        fitted = _fit_rates(candidates, fitted)
        moved = np.abs(np.array(fitted.weights) - np.array(weights)).max()
        weights = fitted.weights
        candidates = OffsetDistances.search(entries, codes, fit, prior, weights, settings.k)
        if moved < _SETTLED:
            break
    # The last candidates are those of the final weights, so τ and ε are fitted to them once more.
    scale = _fit_temperature(candidates, weights)
    progress("judging")
    own = prior[judge.next_tokens]

    def judged(weights: tuple[float, ...], fitted: RateFit) -> Probabilities:
        found = exact_search([entries], codes, judge, settings.k, weights=weights)
        likely = true_token_probability(found, judge.next_tokens, [fitted.temperature], "sum")
        return negative_log_likelihood(likely[0], own, fitted.backoff)

    before, after, alone = judged(equal, plain), judged(weights, scale), -np.log(own)
    columns = np.stack([before, after, before - after, alone], axis=1)
    mean, low, high = mean_interval(columns, judge.images, seed=settings.seed)
    return FittedWeights(
        weights=weights,
        temperature=scale.temperature,
        backoff=scale.backoff,
        equal_temperature=plain.temperature,
        equal_backoff=plain.backoff,
        equal=float(mean[0]),
        learned=float(mean[1]),
        gain=float(mean[2]),
        gain_interval=(float(low[2]), float(high[2])),
        prior=float(mean[3]),
        rounds=done,
        entries=len(entries.keys),
        queries=len(fit.keys),
        judged_on=judge.protocol,
    )


@dataclass(frozen=True)
class OffsetDistances:
    """How far the candidates of Q queries are, offset by offset, and what rates are fitted by."""

    distances: Floats
    """‖q_o − k_o‖², float32 [Q, K, n]; 0 for padding."""
    hit: npt.NDArray[np.float32]
    """float32 [Q, K]: 1 for candidates with the true token, else 0."""
    real: npt.NDArray[np.bool_]
    """bool [Q, K]: which are no padding."""
    prior: Probabilities
    """float64 [Q]: the corpus prior of the true tokens."""

    @staticmethod
    def search(
        entries: PatchBlock,
        codes: Floats,
        queries: Queries,
        prior: Probabilities,
        weights: tuple[float, ...],
        k: int,
    ) -> "OffsetDistances":
        """Of the candidates that are nearest under these weights."""
        found = exact_search([entries], codes, queries, k, weights=weights)
        (count, k), offsets = found.places.shape, len(weights)
        distances = np.zeros((count, k, offsets), np.float32)
        vectors = key_vectors(queries.keys, codes).reshape(count, 1, offsets, -1)
        for start in range(0, count, _QUERIES_AT_ONCE):
            here = slice(start, start + _QUERIES_AT_ONCE)
            keys = entries.keys[np.maximum(found.places[here], 0).reshape(-1)]
            named = key_vectors(keys, codes).reshape(-1, k, offsets, vectors.shape[-1])
            distances[here] = squared_distances(named, vectors[here])
        distances[~found.real] = 0
        hit = (found.tokens == queries.next_tokens[:, None]) & found.real
        own = prior[queries.next_tokens]
        return OffsetDistances(distances, hit.astype(np.float32), found.real, own)


def _fit_rates(candidates: OffsetDistances, start: RateFit) -> RateFit:
    """Rates and back-off that minimise the negative log likelihood, from `start`."""
    offsets = len(start.rates)
    ends = [*np.log(start.rates), logit(start.backoff)]
    return _fit(candidates, np.ones(offsets), np.eye(offsets), ends)


def _fit_temperature(candidates: OffsetDistances, weights: tuple[float, ...]) -> RateFit:
    """The temperature and back-off that suit fixed weights."""
    spread = max(float(candidates.distances.sum(axis=2)[candidates.real].std()), 0.05)
    return _fit(candidates, np.array(weights), np.ones((1, len(weights))), [-np.log(spread), -2.0])


def _fit(candidates: OffsetDistances, base: _Values, moves: _Values, start: list[float]) -> RateFit:
    """The best rates base · exp(x · moves) and back-off; start: x and the back-off's logit."""

    def loss(x: _Values) -> tuple[float, _Values]:
        value, slope = likelihood_loss(candidates, base * np.exp(x[:-1] @ moves), x[-1])
        return value, np.append(moves @ slope[:-1], slope[-1])

    bounds = [np.log(_RATES)] * len(moves) + [logit(_BACKOFFS)]
    options = {"maxiter": 60}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return RateFit(base * np.exp(found.x[:-1] @ moves), float(expit(found.x[-1])))


def likelihood_loss(
    candidates: OffsetDistances, rates: _Values, backoff_logit: float
) -> tuple[float, _Values]:
    """The mean negative log likelihood and its slopes by ln(rates) and the back-off's logit.

    With e_k = exp(−Σ_o r_o · D_ko), Z = Σ e_k, A = Σ_hit e_k and p = A / Z:
    ∂p/∂r_o = (p · Σ_k e_k · D_ko − Σ_hit e_k · D_ko) / Z.
    """
    scores = candidates.distances @ rates.astype(np.float32)
    scores[~candidates.real] = np.inf
    nearest = scores.min(axis=1, keepdims=True)
    mass = np.exp(np.where(np.isfinite(nearest), nearest, 0) - scores)
    hit = mass * candidates.hit
    total = np.maximum(mass.sum(axis=1, dtype=np.float64), 1e-30)
    p = hit.sum(axis=1, dtype=np.float64) / total
    backoff = expit(backoff_logit)
    likelihood = (1 - backoff) * p + backoff * candidates.prior
    pulls = np.matmul(mass[:, None], candidates.distances)[:, 0]
    hits = np.matmul(hit[:, None], candidates.distances)[:, 0]
    by_rate = (p[:, None] * pulls - hits) / total[:, None]
    slope = -((1 - backoff) * by_rate / likelihood[:, None]).mean(axis=0) * rates
    by_backoff = -((candidates.prior - p) / likelihood).mean() * backoff * (1 - backoff)
    return float(-np.log(likelihood).mean()), np.append(slope, by_backoff)
