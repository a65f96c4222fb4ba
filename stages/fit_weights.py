"""Which neighbours tell most of the next token: weights of the offsets, learned from a database.

In: entries and queries sampled from the database itself. Out: weights w_o of mean 1 with which
Σ_o w_o · ‖q_o − k_o‖² retrieves, a temperature τ, and a share ε of the corpus prior, which together
make the true next tokens likelier: −ln((1 − ε) · p_ret + ε · p_prior) is minimised, p_ret merged by
sum, with the query's own picture and its copies left out.

How: the candidates of each query are searched exactly under the current weights, then weights, τ and
ε are fitted to them by L-BFGS with the analytic gradient, then the candidates are searched again, and
so on for a few rounds, since weights change who the candidates are. Equal weights get their own τ and
ε. What is reported comes from pictures that were used for neither fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from schemas.errors import BadInputError
from schemas.specs import Floats, key_vectors
from stages.bootstrap import mean_interval
from stages.exact_search import Nearest, Queries, exact_search
from stages.read_patches import BLOCK, PatchBlock
from stages.retrieved_distribution import (
    Probabilities,
    negative_log_likelihood,
    true_token_probability,
)

SMALLEST, LARGEST = 1e-3, 1e3
"""Bounds on an offset's weight by temperature."""
BACKOFF = (1e-4, 0.95)
CHUNK = 64
"""Queries whose candidates are held as vectors at once."""
SETTLED = 0.02
"""Rounds end when no weight changes by more."""


@dataclass(frozen=True)
class WeightSettings:
    """How much is sampled. `queries` for the fit and again as many to judge it, from `pictures` each."""

    entries: int = 1_000_000
    pictures: int = 300
    queries: int = 3000
    k: int = 1024
    rounds: int = 4
    seed: int = 0


@dataclass(frozen=True)
class FittedWeights:
    """The outcome. Likelihoods are in nats a token, on pictures used for neither fit.

    equal, learned: mean negative log likelihood with equal weights and with `weights`, each with its
    own temperature and back-off; gain: equal − learned, with the 95 % interval of a paired bootstrap
    over pictures; prior: that of the corpus prior alone.
    """

    weights: tuple[float, ...]
    temperature: float
    backoff: float
    equal_temperature: float
    equal_backoff: float
    equal: float
    learned: float
    gain: float
    gain_interval: tuple[float, float]
    prior: float
    rounds: int
    entries: int
    queries: int
    judged_on: str

    @property
    def helps(self) -> bool:
        """Whether the interval of the gain lies above zero."""
        return self.gain_interval[0] > 0

    def to_json(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return asdict(self)

    def to_text(self) -> str:
        """One line for people."""
        low, high = self.gain_interval
        weights = ", ".join(f"{weight:.2f}" for weight in self.weights)
        return (
            f"offset weights {weights}: negative log likelihood {self.equal:.3f} with equal weights,"
            f" {self.learned:.3f} with these, gain {self.gain:.3f} ({low:.3f} to {high:.3f}; the"
            f" prior alone {self.prior:.3f}; {self.judged_on})"
        )


def corpus_prior(next_tokens: npt.NDArray[np.uint16], vocabulary: int) -> Probabilities:
    """The share of each token float64 [V], every one counted once more, so that none is 0."""
    counts = np.bincount(next_tokens, minlength=vocabulary) + 1.0
    prior: Probabilities = counts / counts.sum()
    return prior


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
    neighbors = fit.keys.shape[1]
    prior = corpus_prior(entries.next_tokens, len(codes))
    equal = weights = (1.0,) * neighbors
    progress("equal weights")
    candidates = _Candidates.search(entries, codes, fit, prior, equal, settings.k)
    plain = _fit_temperature(candidates)
    fitted = _Fit(np.full(neighbors, 1 / plain.temperature), plain.backoff)
    done = 0
    for done in range(1, settings.rounds + 1):
        progress(f"round {done}")
        fitted = _fit(candidates, fitted)
        moved = np.abs(np.array(fitted.weights) - np.array(weights)).max()
        weights = fitted.weights
        candidates = _Candidates.search(entries, codes, fit, prior, weights, settings.k)
        if moved < SETTLED:
            break
    # The last candidates are those of the final weights, so τ and ε are fitted to them once more.
    scale = _fit_temperature(candidates, weights)
    progress("judging")
    before = _judge(entries, codes, judge, prior, equal, plain, settings.k)
    after = _judge(entries, codes, judge, prior, weights, scale, settings.k)
    alone = -np.log(prior[judge.next_tokens])
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
class _Fit:
    """rates: w_o / τ float64 [n]; backoff: ε."""

    rates: npt.NDArray[np.float64]
    backoff: float

    @property
    def temperature(self) -> float:
        return float(1 / self.rates.mean())

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of mean 1."""
        return tuple(float(w) for w in self.rates / self.rates.mean())


@dataclass(frozen=True)
class _Candidates:
    """The candidates of Q queries: distances float32 [Q, K, n] offset by offset (0 for padding),
    hit and real [Q, K], and the prior of the true tokens [Q]."""

    distances: Floats
    hit: npt.NDArray[np.float32]
    real: npt.NDArray[np.bool_]
    prior: Probabilities

    @staticmethod
    def search(
        entries: PatchBlock,
        codes: Floats,
        queries: Queries,
        prior: Probabilities,
        weights: tuple[float, ...],
        k: int,
    ) -> "_Candidates":
        found = exact_search(_blocks(entries), codes, queries, k, weights=weights)
        real = found.rows >= 0
        return _Candidates(
            _offset_distances(entries, codes, queries, found),
            ((found.tokens == queries.next_tokens[:, None]) & real).astype(np.float32),
            real,
            prior[queries.next_tokens],
        )


def _offset_distances(
    entries: PatchBlock, codes: Floats, queries: Queries, found: Nearest
) -> Floats:
    """‖q_o − k_o‖² of every candidate, float32 [Q, K, n]; 0 for padding."""
    (count, k), neighbors = found.rows.shape, queries.keys.shape[1]
    distances = np.zeros((count, k, neighbors), np.float32)
    vectors = key_vectors(queries.keys, codes).reshape(count, 1, neighbors, -1)
    for start in range(0, count, CHUNK):
        rows = found.rows[start : start + CHUNK]
        keys = key_vectors(entries.keys[np.maximum(rows, 0).reshape(-1)], codes)
        keys = keys.reshape(*rows.shape, neighbors, -1)
        keys -= vectors[start : start + CHUNK]
        distances[start : start + CHUNK] = np.einsum("qknd,qknd->qkn", keys, keys)
    distances[found.rows < 0] = 0
    return distances


def _fit(candidates: _Candidates, start: _Fit) -> _Fit:
    """Rates and back-off that minimise the negative log likelihood, from `start`."""
    neighbors = len(start.rates)
    low, high = np.log(SMALLEST), np.log(LARGEST)
    found = minimize(
        lambda x: _loss(candidates, np.exp(x[:neighbors]), x[neighbors]),
        [*np.log(start.rates), np.log(start.backoff / (1 - start.backoff))],
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high)] * neighbors + [_logits()],
        options={"maxiter": 60},
    )
    return _Fit(np.exp(found.x[:neighbors]), float(1 / (1 + np.exp(-found.x[neighbors]))))


def _fit_temperature(candidates: _Candidates, weights: tuple[float, ...] | None = None) -> _Fit:
    """The temperature and back-off that suit fixed weights, by default equal ones."""
    fixed = np.ones(candidates.distances.shape[2]) if weights is None else np.array(weights)

    def loss(x: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        rates = fixed * np.exp(x[0])
        value, slope = _loss(candidates, rates, x[1])
        return value, np.array([slope[:-1].sum(), slope[-1]])

    spread = candidates.distances.sum(axis=2)[candidates.real].std()
    found = minimize(
        loss,
        [-np.log(max(float(spread), 0.05)), -2.0],
        jac=True,
        method="L-BFGS-B",
        bounds=[(np.log(SMALLEST), np.log(LARGEST)), _logits()],
    )
    return _Fit(fixed * np.exp(found.x[0]), float(1 / (1 + np.exp(-found.x[1]))))


def _loss(
    candidates: _Candidates, rates: npt.NDArray[np.float64], logit: float
) -> tuple[float, npt.NDArray[np.float64]]:
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
    backoff = 1 / (1 + np.exp(-logit))
    likelihood = (1 - backoff) * p + backoff * candidates.prior
    pulls = np.matmul(mass[:, None], candidates.distances)[:, 0]
    hits = np.matmul(hit[:, None], candidates.distances)[:, 0]
    by_rate = (p[:, None] * pulls - hits) / total[:, None]
    slope = -((1 - backoff) * by_rate / likelihood[:, None]).mean(axis=0) * rates
    by_backoff = -((candidates.prior - p) / likelihood).mean() * backoff * (1 - backoff)
    return float(-np.log(likelihood).mean()), np.append(slope, by_backoff)


def _judge(
    entries: PatchBlock,
    codes: Floats,
    queries: Queries,
    prior: Probabilities,
    weights: tuple[float, ...],
    fit: _Fit,
    k: int,
) -> Probabilities:
    """The negative log likelihood of each query's true token, float64 [Q]."""
    found = exact_search(_blocks(entries), codes, queries, k, weights=weights)
    retrieved = true_token_probability(found, queries.next_tokens, [fit.temperature], "sum")[0]
    return negative_log_likelihood(retrieved, prior[queries.next_tokens], fit.backoff)


def _blocks(entries: PatchBlock) -> Iterator[PatchBlock]:
    for start in range(0, len(entries.keys), BLOCK):
        cut = slice(start, start + BLOCK)
        yield PatchBlock(entries.patch_ids[cut], entries.keys[cut], entries.next_tokens[cut])


def _logits() -> tuple[float, float]:
    """The bounds of the back-off as logits."""
    low, high = BACKOFF
    return float(np.log(low / (1 - low))), float(np.log(high / (1 - high)))
