"""Rates of the offsets, temperature and back-off that make true next tokens likeliest.

In: queries with their candidates, found under some weights. Out: the rates w_o / τ and the share ε of
the corpus prior that minimise the mean of −ln((1 − ε) · p_ret + ε · p_prior), where
p_ret(v) ∝ Σ_{k: token v} exp(−Σ_o (w_o / τ) · ‖q_o − k_o‖²), the merge by sum. L-BFGS with the
analytic gradient, in the logarithms of the rates and the logit of ε.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from arrag_runtime.format.patches import BLOCK, PatchBlock
from arrag_runtime.format.specs import Floats, key_vectors
from stages.measure.exact_search import Nearest, Queries, exact_search
from stages.measure.retrieved_distribution import Probabilities

SMALLEST, LARGEST = 1e-3, 1e3
"""Bounds on an offset's weight by temperature."""
BACKOFF = (1e-4, 0.95)
CHUNK = 64
"""Queries whose candidates are held as vectors at once."""


@dataclass(frozen=True)
class RateFit:
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
class Candidates:
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
    ) -> "Candidates":
        found = exact_search(entry_blocks(entries), codes, queries, k, weights=weights)
        real = found.rows >= 0
        return Candidates(
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


def fit_rates(candidates: Candidates, start: RateFit) -> RateFit:
    """Rates and back-off that minimise the negative log likelihood, from `start`."""
    neighbors = len(start.rates)
    low, high = np.log(SMALLEST), np.log(LARGEST)
    found = minimize(
        lambda x: likelihood_loss(candidates, np.exp(x[:neighbors]), x[neighbors]),
        [*np.log(start.rates), np.log(start.backoff / (1 - start.backoff))],
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high)] * neighbors + [_logits()],
        options={"maxiter": 60},
    )
    return RateFit(np.exp(found.x[:neighbors]), float(1 / (1 + np.exp(-found.x[neighbors]))))


def fit_temperature(candidates: Candidates, weights: tuple[float, ...] | None = None) -> RateFit:
    """The temperature and back-off that suit fixed weights, by default equal ones."""
    fixed = np.ones(candidates.distances.shape[2]) if weights is None else np.array(weights)

    def loss(x: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        rates = fixed * np.exp(x[0])
        value, slope = likelihood_loss(candidates, rates, x[1])
        return value, np.array([slope[:-1].sum(), slope[-1]])

    spread = candidates.distances.sum(axis=2)[candidates.real].std()
    found = minimize(
        loss,
        [-np.log(max(float(spread), 0.05)), -2.0],
        jac=True,
        method="L-BFGS-B",
        bounds=[(np.log(SMALLEST), np.log(LARGEST)), _logits()],
    )
    return RateFit(fixed * np.exp(found.x[0]), float(1 / (1 + np.exp(-found.x[1]))))


def likelihood_loss(
    candidates: Candidates, rates: npt.NDArray[np.float64], logit: float
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


def entry_blocks(entries: PatchBlock) -> Iterator[PatchBlock]:
    """Entries in memory as a table gives them."""
    for start in range(0, len(entries.keys), BLOCK):
        cut = slice(start, start + BLOCK)
        yield entries.take(cut)


def _logits() -> tuple[float, float]:
    """The bounds of the back-off as logits."""
    low, high = BACKOFF
    return float(np.log(low / (1 - low))), float(np.log(high / (1 - high)))
