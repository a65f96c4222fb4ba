"""PatchBlender: blends retrieved candidates with the features around a position.

In: for N positions the features of the cells before them in raster order, and K candidate vectors
each. Out: K blended vectors each, and their scores. A hop h sees the (2h + 1) x (2h + 1) window
around the position, with the candidate in its centre and zeros from there on, through two
convolutions of kernel h + 1 without padding: the first visits every window of that size that
contains the centre, the second pools its results (AR-RAG, arXiv 2506.06962, section 3.3 and
Algorithm 1).

No step between window and blended vector is non-linear, so all hops fold into one D x D matrix for
each cell of the window: only the candidate's own product is left to be done for each candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from arrag_runtime.format.errors import BadInputError

Mix = Literal["softmax", "mean"]
_MIXES: tuple[Mix, ...] = ("softmax", "mean")
"""How hops are mixed: by learned weights (released code), or equally (Algorithm 1)."""
Form = Literal["folded", "convolutions"]
FORMS: tuple[Form, ...] = ("folded", "convolutions")
_HOPS = (1, 2, 3)


def past_cells(reach: int) -> tuple[tuple[int, int], ...]:
    """The offsets (row, column) of a window's cells before its centre, in raster order."""
    span = range(-reach, reach + 1)
    return tuple((row, col) for row in span for col in span if (row, col) < (0, 0))


def require_hops(hops: Sequence[int]) -> tuple[int, ...]:
    """The hops in ascending order. Raises BadInputError for none, repeated or unknown ones."""
    known = tuple(sorted(hops))
    if not known or len(set(known)) < len(known) or not set(known) <= set(_HOPS):
        raise BadInputError(
            f"hops {','.join(map(str, hops)) or 'are empty'}; give one or more of"
            f" {', '.join(map(str, _HOPS))}, each once"
        )
    return known


def multiply_adds(dim: int, hops: Sequence[int], candidates: int, form: Form) -> int:
    """The multiply-adds of one blender at one position, scores included, biases left out.

    Convolutions repeat everything for each candidate; folded, the neighbours' part is shared.
    """
    square = dim * dim
    scores = candidates * (square + dim)
    if form == "folded":
        return (len(past_cells(max(hops))) + candidates) * square + scores
    kernels = [(hop + 1) ** 2 for hop in hops]
    return candidates * sum(cells * cells + cells for cells in kernels) * square + scores


@dataclass(frozen=True)
class Folded:
    """A blender's convolutions as matrices."""

    near: Tensor
    """[D, n · D], for the n cells before the centre in raster order."""
    own: Tensor
    """[D, D], for the candidate."""
    bias: Tensor
    """[D]."""

    def __call__(self, near: Tensor, candidates: Tensor) -> Tensor:
        """Blended vectors [N, K, D] from neighbours [N, n, D] and candidates [N, K, D]."""
        shared = linear(near.flatten(1), self.near, self.bias)
        return linear(candidates, self.own) + shared[:, None]


class PatchBlender(nn.Module):
    """The convolutions, hop weights and scoring network of one augmented layer.

    Parameters carry the released names: conv1 and conv12 are hop 1's first and second convolution,
    conv2 and conv22 hop 2's, conv3 and conv32 hop 3's; conv_weights exists with several hops mixed
    by softmax. Initialisation is Kaiming's.
    """

    def __init__(self, dim: int, hops: Sequence[int] = (1, 2), mix: Mix = "softmax") -> None:
        super().__init__()
        if mix not in _MIXES:
            raise BadInputError(f"unknown mix '{mix}'; choose one of {', '.join(_MIXES)}")
        self.dim, self.hops, self.mix = dim, require_hops(hops), mix
        self.reach = max(self.hops)  # half the window's side
        for hop in self.hops:
            for name in _names(hop):
                self.add_module(name, _kaiming(nn.Conv2d(dim, dim, hop + 1), "linear"))
        if len(self.hops) > 1 and mix == "softmax":
            self.conv_weights = nn.Parameter(torch.ones(len(self.hops)))
        inner, last = nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.mlp = nn.Sequential(_kaiming(inner, "relu"), nn.ReLU(), _kaiming(last, "linear"))

    @property
    def conv_dtype(self) -> torch.dtype:
        """The dtype of its convolutions' weights."""
        return self._convolutions(self.hops[0])[0].weight.dtype

    def forward(self, near: Tensor, candidates: Tensor) -> Tensor:
        """Blended vectors [N, K, D] through the convolutions, as the paper writes them.

        near: [N, n, D], the n = `len(past_cells(reach))` cells before the centre in raster order,
        zero where there is none; candidates: [N, K, D].
        """
        count, k, dim = candidates.shape
        side, past = 2 * self.reach + 1, near.shape[1]
        cells = candidates.new_zeros(count, k, side * side, dim)
        cells[:, :, :past] = near[:, None]
        cells[:, :, past] = candidates
        window = cells.view(count * k, side, side, dim).permute(0, 3, 1, 2)
        blended = candidates.new_zeros(count * k, dim)
        for hop, share in zip(self.hops, self._shares(), strict=True):
            first, second = self._convolutions(hop)
            inner = slice(self.reach - hop, self.reach + hop + 1)
            blended = blended + share * second(first(window[:, :, inner, inner]))[:, :, 0, 0]
        return blended.view(count, k, dim)

    def score(self, blended: Tensor) -> Tensor:
        """How much of each blended vector [..., D] to take, [..., 1] in 0..1."""
        score: Tensor = torch.sigmoid(self.mlp(blended))
        return score

    def fold(self) -> Folded:
        """The convolutions as matrices, at least in float32; differentiable in the parameters."""
        wide = torch.promote_types(self.conv_dtype, torch.float32)
        shares = self._shares().to(wide)
        cells = (*past_cells(self.reach), (0, 0))
        matrices = {cell: shares.new_zeros(self.dim, self.dim) for cell in cells}
        bias = shares.new_zeros(self.dim)
        with torch.autocast(shares.device.type, enabled=False):
            for hop, share in zip(self.hops, shares, strict=True):
                first, second = self._convolutions(hop)
                # As matrices side by side, [rows, columns, D, D].
                inner = first.weight.to(wide).permute(2, 3, 0, 1).contiguous()
                outer = share * second.weight.to(wide).permute(2, 3, 0, 1).contiguous()
                assert first.bias is not None
                assert second.bias is not None
                bias = bias + share * second.bias.to(wide)
                bias = bias + outer.sum((0, 1)) @ first.bias.to(wide)
                taps = list(product(range(hop + 1), repeat=2))
                for second_tap, tap in product(taps, taps):
                    cell = (tap[0] + second_tap[0] - hop, tap[1] + second_tap[1] - hop)
                    if cell in matrices:  # those after the centre are zero
                        # One sum at a time: nothing but the weights is kept for the gradients.
                        matrices[cell] = matrices[cell] + outer[second_tap] @ inner[tap]
        own = matrices.pop((0, 0))
        return Folded(torch.cat(list(matrices.values()), 1), own, bias)

    def _shares(self) -> Tensor:
        """The hops' weights, one each, summing to 1."""
        if len(self.hops) > 1 and self.mix == "softmax":
            return torch.softmax(self.conv_weights, 0)
        weight = self._convolutions(self.hops[0])[0].weight
        return weight.new_full((len(self.hops),), 1 / len(self.hops))

    def _convolutions(self, hop: int) -> tuple[nn.Conv2d, nn.Conv2d]:
        first, second = (cast(nn.Conv2d, self.get_submodule(name)) for name in _names(hop))
        return first, second


def _kaiming(layer: nn.Linear | nn.Conv2d, follows: Literal["linear", "relu"]) -> nn.Module:
    """The layer with Kaiming-initialised weights and zero biases."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity=follows)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _names(hop: int) -> tuple[str, str]:
    """The released names of a hop's two convolutions."""
    return f"conv{hop}", f"conv{hop}2"
