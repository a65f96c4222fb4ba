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

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.patches import PatchBlock, PatchTable
from arrag_runtime.format.specs import Floats, KeySpec, TokenizerSpec
from stages.measure.confidence import mean_interval
from stages.measure.exact_search import Queries, exact_search
from stages.measure.offset_rates import (
    Candidates,
    RateFit,
    entry_blocks,
    fit_rates,
    fit_temperature,
)
from stages.measure.retrieved_distribution import (
    Probabilities,
    negative_log_likelihood,
    true_token_probability,
)
from stages.measure.sample_queries import halves, sample_queries

SETTLED = 0.02
"""Rounds end when no weight changes by more."""


@dataclass(frozen=True)
class WeightSettings:
    """How much is sampled: entries of the table to retrieve from, and for the fit and again for judging
    `queries` positions of `pictures` pictures. k: candidates a query, as many as DAiD retrieves: fewer
    leave much of the likelihood out. rounds: at most so many."""

    entries: int = 1_000_000
    pictures: int = 300
    queries: int = 2000
    k: int = 2048
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
        *(images, spec, keys),
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
    neighbors = fit.keys.shape[1]
    prior = corpus_prior(entries.next_tokens, len(codes))
    equal = weights = (1.0,) * neighbors
    progress("equal weights")
    candidates = Candidates.search(entries, codes, fit, prior, equal, settings.k)
    plain = fit_temperature(candidates)
    fitted = RateFit(np.full(neighbors, 1 / plain.temperature), plain.backoff)
    done = 0
    for done in range(1, settings.rounds + 1):
        progress(f"round {done}")
        fitted = fit_rates(candidates, fitted)
        moved = np.abs(np.array(fitted.weights) - np.array(weights)).max()
        weights = fitted.weights
        candidates = Candidates.search(entries, codes, fit, prior, weights, settings.k)
        if moved < SETTLED:
            break
    # The last candidates are those of the final weights, so τ and ε are fitted to them once more.
    scale = fit_temperature(candidates, weights)
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


def _judge(
    entries: PatchBlock,
    codes: Floats,
    queries: Queries,
    prior: Probabilities,
    weights: tuple[float, ...],
    fit: RateFit,
    k: int,
) -> Probabilities:
    """The negative log likelihood of each query's true token, float64 [Q]."""
    found = exact_search(entry_blocks(entries), codes, queries, k, weights=weights)
    retrieved = true_token_probability(found, queries.next_tokens, [fit.temperature], "sum")[0]
    return negative_log_likelihood(retrieved, prior[queries.next_tokens], fit.backoff)
