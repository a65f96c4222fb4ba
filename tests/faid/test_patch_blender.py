"""The blender's arithmetic: what is counted, and what shape and start it has."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arrag_runtime.faid.patch_blender import PatchBlender, multiply_adds, past_cells
from arrag_runtime.format.errors import BadInputError

HOPS = [(1,), (2,), (1, 2), (1, 2, 3)]


@pytest.mark.parametrize("hops", HOPS)
def test_multiply_adds_are_what_torch_counts(hops: tuple[int, ...]) -> None:
    dim, k = 16, 5
    blender = PatchBlender(dim, hops)
    near, entering = torch.randn(1, len(past_cells(max(hops))), dim), torch.randn(1, k, dim)
    folded = blender.fold()
    with FlopCounterMode(display=False) as unfolded_flops:
        one = blender.score(blender(near, entering))
    with FlopCounterMode(display=False) as folded_flops:
        other = blender.score(folded(near, entering))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    counted = unfolded_flops.get_total_flops()
    assert counted == 2 * multiply_adds(dim, hops, k, "convolutions")
    assert folded_flops.get_total_flops() == 2 * multiply_adds(dim, hops, k, "folded")


def test_folding_saves_more_than_ten_times_the_multiply_adds() -> None:
    square = 2048**2
    unfolded = multiply_adds(2048, (1, 2), 10, "convolutions")
    folded = multiply_adds(2048, (1, 2), 10, "folded")
    assert round(unfolded / square) == 1110
    assert round(folded / square) == 32
    assert unfolded > 10 * folded


def test_the_window_before_a_position_is_causal() -> None:
    assert past_cells(1) == ((-1, -1), (-1, 0), (-1, 1), (0, -1))
    assert [len(past_cells(reach)) for reach in (1, 2, 3)] == [4, 12, 24]


def test_parameters_carry_the_released_names_and_start_as_the_paper_says() -> None:
    names = dict(PatchBlender(8, (1, 2, 3)).named_parameters())
    both = ("weight", "bias")
    convolutions = ("conv1", "conv12", "conv2", "conv22", "conv3", "conv32", "mlp.0", "mlp.2")
    assert names.keys() == {f"{c}.{part}" for c in convolutions for part in both} | {"conv_weights"}
    assert {tuple(names[f"conv{h}.weight"].shape) for h in (1, 2, 3)} == {
        (8, 8, 2, 2),
        (8, 8, 3, 3),
        (8, 8, 4, 4),
    }
    assert names["conv_weights"].tolist() == [1, 1, 1]
    for hops, mix in (((2,), "softmax"), ((1, 2), "mean")):
        assert not hasattr(PatchBlender(8, hops, mix), "conv_weights")  # type: ignore[arg-type]


def test_the_mix_is_a_known_one() -> None:
    with pytest.raises(BadInputError, match="unknown mix 'sum'; choose one of softmax, mean"):
        PatchBlender(8, (1,), "sum")  # type: ignore[arg-type]
