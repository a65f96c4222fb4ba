"""The network of VQ-16 against transformers' JanusVQVAE with the same weights, bit for bit."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from arrag_runtime.tokenizers.vq_model import VQModel
from tests.conftest import narrow_model

ROOT = Path(__file__).parents[2]
SHAPES: dict[str, tuple[Sequence[int], int]] = {
    "flat": ((1, 1, 1, 1, 1), 1),
    "vq16": ((1, 1, 2, 2, 4), 2),
    "wide first, three blocks": ((2, 1, 3), 3),
    "two levels": ((1, 2), 1),
}
CHANNELS_LAST = torch.channels_last
PLACES = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, CHANNELS_LAST),
    "bfloat16": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels last": (torch.bfloat16, CHANNELS_LAST),
}


def outputs(model: Any, dtype: torch.dtype, layout: torch.memory_format, stride: int) -> Any:
    """Latents of two pictures that are not square, and pictures of two grids."""
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 5 * stride, 4 * stride, generator=random) * 2 - 1
    codes = torch.randn(2, 8, 5, 4, generator=random)
    pictures, codes = (t.to(dtype).contiguous(memory_format=layout) for t in (pictures, codes))
    placed = model.to(dtype).to(memory_format=layout)
    latents = placed.quant_conv(placed.encoder(pictures))
    return latents, placed.decoder(placed.post_quant_conv(codes))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_transformers(shape: str, place: str) -> None:
    """Encoder and decoder, at several widths and depths, in both precisions and memory layouts."""
    theirs = narrow_model(*SHAPES[shape], seed=2).requires_grad_(False)
    ours = VQModel.load(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    stride = 2 ** (len(SHAPES[shape][0]) - 1)
    expected = outputs(theirs, *PLACES[place], stride)
    for found, wanted in zip(outputs(ours, *PLACES[place], stride), expected, strict=True):
        assert torch.equal(found, wanted)
        assert found.float().std() > 0


def test_weights_are_copied_frozen_and_of_float32() -> None:
    """In half precision on disk too; what comes later of the given tensors is not seen."""
    state = {name: t.half() for name, t in narrow_model().state_dict().items()}
    model = VQModel.load(state)
    before = model.codebook.clone()
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(model.codebook, before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decoder.conv_out.bias"), "decoder.conv_out.bias"),
        (lambda state: state.update(other=torch.zeros(1)), "other"),
        (lambda state: state.update({"encoder.conv_out.bias": torch.zeros(3)}), "size mismatch"),
    ],
)
def test_every_name_and_shape_must_match(change: Any, message: str) -> None:
    """A tensor that is missing, unknown or of another shape is an error that names it."""
    state = dict(narrow_model().state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        VQModel.load(state)


def test_encoding_a_picture_does_not_load_transformers() -> None:
    """Asking a database with a picture would take seconds longer."""
    code = (
        "import sys, numpy as np\n"
        "from arrag_runtime.tokenizers import load_tokenizer\n"
        "tokenizer = load_tokenizer('sample')\n"
        "tokenizer.setup('cpu')\n"
        "tokenizer.encode(np.zeros((1, 384, 384, 3), np.uint8))\n"
        "print(*sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "torch" in run.stdout.split()
    assert "transformers" not in run.stdout.split()
