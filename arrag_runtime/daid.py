"""DAiD, distribution augmentation in decoding: what was retrieved shifts what is sampled.

In: the model's probabilities of the next image token, after guidance, and the neighbours that a
`Retriever` found for the position. Out: probabilities to sample from. A pure function of tensors,
for any decode loop; no training.

Source: AR-RAG (arXiv 2506.06962), section 3.2: p = (1 - λ) · p_model + λ · softmax(-d / τ).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.search.neighbors import Neighbors
from arrag_runtime.settings import Option

if TYPE_CHECKING:
    from torch import Tensor

Merge = Literal["nearest", "sum"]
MERGES: tuple[Merge, ...] = ("nearest", "sum")
LAMBDA, TAU = 0.05, 0.6
"""The paper's constants. τ was tuned on distances of a lossy index, so it is a starting value."""


@dataclass(frozen=True, kw_only=True)
class DaidSettings:
    """How retrieved tokens are mixed in."""

    lam: Annotated[float, Option(flags="--lambda")] = LAMBDA
    """DAiD: λ, the share of what was retrieved, 0..1."""
    tau: Annotated[float, Option()] = TAU
    """DAiD: τ, the temperature of distances, in units of squared L2, above 0."""
    merge: Annotated[Merge, Option()] = "nearest"
    """DAiD: entries of one token count by the nearest (as released), or by their sum (as kNN-LM)."""
    entropy_above: Annotated[float | None, Option(shown="everywhere")] = None
    """DAiD: only where the model's entropy, in nats, is above this."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise BadInputError(f"λ is {self.lam}; it is a share, so use 0..1 (the paper's 0.05)")
        if not self.tau > 0:
            raise BadInputError(f"τ is {self.tau}; use a number above 0 (the paper's 0.6)")
        if self.merge not in MERGES:
            raise BadInputError(f"unknown merge '{self.merge}'; choose one of {', '.join(MERGES)}")


def merge(
    p_model: "Tensor",
    neighbors: Neighbors | None,
    *,
    lam: float = LAMBDA,
    tau: float = TAU,
    merge: Merge = "nearest",
) -> "Tensor":
    """The probabilities [B, V] to sample from: (1 - λ) · p_model + λ · p_retrieved.

    p_model: float [B, V], rows summing to 1; it stays as it is. neighbors: those of each picture's
    own context, [B, K]; only the first `count` of a row are read, and a row without any keeps
    p_model, as all rows do where neighbors is None (a position without a full neighbourhood).
    lam: λ in 0..1; with 0 the result is p_model bit for bit. tau: τ, in squared L2.
    Raises BadInputError for λ, τ or merge out of range, or neighbours of another number of rows.
    """
    return mix(p_model, neighbors, DaidSettings(lam=lam, tau=tau, merge=merge))


def mix(p_model: "Tensor", neighbors: Neighbors | None, settings: DaidSettings) -> "Tensor":
    """`merge` with its settings in one value, and with `entropy_above`."""
    if neighbors is None:
        return p_model
    retrieved = distribution(neighbors, p_model, settings.tau, settings.merge)
    mixed = (1 - settings.lam) * p_model + settings.lam * retrieved
    some = counting(neighbors).any(axis=1, keepdims=True)
    if not some.all():  # a row without any keeps every bit of p_model
        mixed = mixed.where(_tensor(some, p_model), p_model)
    if settings.entropy_above is not None:
        mixed = mixed.where(entropy(p_model)[:, None] > settings.entropy_above, p_model)
    return mixed


def distribution(
    neighbors: Neighbors, p_model: "Tensor", tau: float = TAU, merge: Merge = "nearest"
) -> "Tensor":
    """p_retrieved [B, V], in p_model's dtype and on its device; uniform in rows without neighbours.

    An entry counts for its database's weight times exp(-d / τ); where entries of a token are
    summed, times the number of identical ones that it stands for.
    """
    if neighbors.tokens.shape[0] != p_model.shape[0]:
        raise BadInputError(
            f"neighbours of {neighbors.tokens.shape[0]} positions for probabilities of"
            f" {p_model.shape[0]}; retrieve one row a picture"
        )
    weights = entry_weights(neighbors, merge)
    found = weights > 0
    # What does not count scores -inf, so token 0, which padding carries, gains nothing by it.
    scores = np.full(found.shape, -np.inf, np.float32)
    scores[found] = np.log(weights[found]) - neighbors.distances[found] / np.float32(tau)
    tokens = _tensor(neighbors.tokens.astype(np.int64), p_model)
    logits = _tensor(scores, p_model)
    if merge == "sum":
        retrieved = p_model.new_zeros(p_model.shape)
        retrieved = retrieved.scatter_add_(1, tokens, logits.softmax(dim=-1))
    else:
        best = p_model.new_full(p_model.shape, -float("inf"))
        retrieved = best.scatter_reduce_(1, tokens, logits, "amax").softmax(dim=-1)
    some = found.any(axis=1, keepdims=True)
    if some.all():
        return retrieved
    uniform = p_model.new_full((), 1 / p_model.shape[1])
    return retrieved.where(_tensor(some, p_model), uniform)


def entry_weights(neighbors: Neighbors, merge: Merge) -> npt.NDArray[Any]:
    """What each result counts for besides its distance, float [B, K]; 0 for padding.

    The weight of its database, and where entries of a token are summed, as often as it has copies.
    """
    weights = neighbors.weights * neighbors.copies if merge == "sum" else neighbors.weights
    return np.where(neighbors.real, weights, 0)


def counting(neighbors: Neighbors) -> npt.NDArray[np.bool_]:
    """Which results count, bool [B, K]: those within `count`, of a database with a weight."""
    return neighbors.real & (neighbors.weights > 0)


def entropy(probabilities: "Tensor") -> "Tensor":
    """The entropy of each row, nats [B]."""
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=-1)


def _tensor(values: Any, like: "Tensor") -> "Tensor":
    """A numpy array as a tensor of like's dtype (integers stay exact) on its device."""
    import torch

    made = torch.from_numpy(np.ascontiguousarray(values))
    if made.dtype.is_floating_point:
        made = made.to(like.dtype)
    return made.to(like.device, non_blocking=True)
