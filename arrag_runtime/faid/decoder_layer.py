"""One augmented decoder layer: what stands beside it, and what goes into it.

In: the features around N positions and K candidate vectors each. Out: a contribution per position,
and the candidates for the next augmented layer (AR-RAG, section 3.3; released code where they
differ).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from arrag_runtime.faid.adapter import AdapterSpec
from arrag_runtime.faid.patch_blender import Folded, PatchBlender, past_cells
from arrag_runtime.format.neighborhood import MISSING


@dataclass(frozen=True)
class CandidateTokens:
    """The retrieved tokens of some positions, which each augmented layer blends."""

    tokens: Tensor
    """Long [.., K], the vocabulary's size standing for none."""
    real: Tensor
    """[.., K, 1], 0 where there is none, which is a zero vector in every layer."""
    share: Tensor
    """[.., K, 1], the weight of each in the mean."""

    @classmethod
    def of(cls, retrieved: Tensor, vocabulary: int, dtype: torch.dtype) -> "CandidateTokens":
        """The candidates among retrieved tokens, long [.., K] with `MISSING` for none.

        The mean is over the real ones; where there is none at all (borders), over K zero vectors.
        """
        none = retrieved == MISSING
        real = (~none).to(dtype)
        count = real.sum(-1, keepdim=True)
        share = torch.where(count > 0, real / count.clamp(min=1), 1 / retrieved.shape[-1])
        return cls(retrieved.masked_fill(none, vocabulary), real[..., None], share[..., None])


class AugmentedLayer(nn.Module):
    """What is trained beside one decoder layer: its norm of candidates, and its blender."""

    def __init__(self, spec: AdapterSpec, epsilon: float) -> None:
        super().__init__()
        self.retrieval_layernorm = nn.RMSNorm(spec.width, eps=epsilon)
        self.blender = PatchBlender(spec.width, spec.hops, spec.mix)

    def forward(
        self, near: Tensor, entering: Tensor, given: CandidateTokens, folded: Folded | None
    ) -> tuple[Tensor, Tensor]:
        """The contribution [N, D], and the candidates [N, K, D] for the next augmented layer.

        near: [N, n, D] features of the cells before each position, zero for none; entering:
        [N, K, D]; folded: the blender as matrices, None to go through its convolutions.
        """
        norm, weight = self.retrieval_layernorm, self.retrieval_layernorm.weight
        scaled = rms_norm(entering.to(weight.dtype), (weight.numel(),), weight, norm.eps)
        blended: Tensor = (folded or self.blender)(near, scaled * given.real)
        taken = self.blender.score(blended) * blended
        return (taken * given.share).sum(1), taken

    def folded(self) -> Folded:
        """The blender's matrices in the dtype of its weights."""
        dtype, made = self.blender.conv_dtype, self.blender.fold()
        return Folded(made.near.to(dtype), made.own.to(dtype), made.bias.to(dtype))


@lru_cache(maxsize=8)
def window_cells(height: int, width: int, hops: Sequence[int], device: torch.device) -> Tensor:
    """For each position the flat cells of its window before it, long [P, n]; P for one outside."""
    rows, cols = np.divmod(np.arange(height * width), width)
    offsets = np.array(past_cells(max(hops)))
    at_row, at_col = rows[:, None] + offsets[:, 0], cols[:, None] + offsets[:, 1]
    inside = (at_row >= 0) & (at_col >= 0) & (at_col < width)
    cells = np.where(inside, at_row * width + at_col, height * width)
    # Kept for training too, which cannot use what is made in inference mode.
    with torch.inference_mode(False):
        return torch.from_numpy(cells).to(device)
