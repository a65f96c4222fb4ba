"""Tokenizers: the contract, and ids and pictures against the model's own parts put together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import require_grid_fits
from arrag_runtime.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from arrag_runtime.tokenizers.sample import SAMPLE_TOKENIZER
from tests.conftest import pixels

BATCH = np.stack([pixels(seed) for seed in range(2)])


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """Every tokenizer there is; the one that needs weights with narrow ones."""
    if request.param == "vq16":
        yield tokenizer
    else:
        bundled = load_tokenizer(request.param)
        bundled.setup("cpu")
        yield bundled


def as_model_input(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.pow(2).sum(dim=-1, keepdim=True).sqrt()


def test_the_contract_of_a_tokenizer(any_tokenizer: Tokenizer) -> None:
    """Shapes and types, unit codes, latents near their codes, the same answer twice."""
    spec = any_tokenizer.spec
    images = BATCH[:, : spec.image_size, : spec.image_size]
    first = any_tokenizer.encode(images, latents=True)
    grid = (len(images), spec.grid_height, spec.grid_width)
    assert first.tokens.shape == grid
    assert first.tokens.dtype == np.uint16
    assert first.tokens.max() < spec.vocabulary
    assert len(np.unique(first.tokens)) > 20
    codes = any_tokenizer.codebook()
    assert codes.shape == (spec.vocabulary, spec.dimension)
    assert codes.dtype == np.float32
    assert np.allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-5)
    assert first.latents is not None
    assert first.latents.shape == (*grid, spec.dimension)
    assert first.latents.dtype == np.float16
    latents = first.latents.astype(np.float32)
    assert np.allclose(np.linalg.norm(latents, axis=-1), 1, atol=2e-3)
    chosen = (codes[first.tokens] * latents).sum(axis=-1)
    best = np.einsum("bhwd,vd->bhwv", latents, codes).max(axis=-1)
    assert np.allclose(chosen, best, atol=2e-3)
    again = any_tokenizer.encode(images)
    assert again.latents is None
    assert np.array_equal(again.tokens, first.tokens)
    shown = any_tokenizer.decode(first.tokens[:1])
    assert shown.shape == (1, spec.image_size, spec.image_size, 3)
    assert shown.dtype == np.uint8
    assert any_tokenizer.agreement(images[:1]) == 1.0
    assert any_tokenizer.precision == "float32"
    require_grid_fits(spec)


def test_a_batch_gives_the_ids_of_single_pictures(tokenizer: Tokenizer) -> None:
    """Another batch size changes a few ids in a thousand at most."""
    together = tokenizer.encode(BATCH).tokens
    alone = np.concatenate([tokenizer.encode(BATCH[n : n + 1]).tokens for n in range(2)])
    assert (together != alone).mean() < 0.005


def test_ids_are_the_nearest_normalised_codes(tokenizer: Tokenizer, model: Any) -> None:
    """LlamaGen's rule by the full distance formula; transformers' own quantiser differs."""
    with torch.inference_mode():
        inputs = as_model_input(BATCH)
        latents = unit(model.quant_conv(model.encoder(inputs)).permute(0, 2, 3, 1))
        codes = unit(model.quantize.embedding.weight)
        distances = (
            latents.pow(2).sum(dim=-1, keepdim=True)
            + codes.pow(2).sum(dim=-1)
            - 2 * torch.einsum("bhwd,vd->bhwv", latents, codes)
        )
        expected = distances.argmin(dim=-1).numpy()
        theirs = model.encode(inputs).image_tokens.numpy().reshape(expected.shape)
    tokens = tokenizer.encode(BATCH).tokens
    assert (tokens != expected).mean() < 0.002
    assert (tokens == theirs).mean() < 0.8
    assert np.allclose(tokenizer.codebook(), codes.numpy(), atol=1e-6)


def test_decoding_runs_normalised_codes_through_the_decoder(
    tokenizer: Tokenizer, model: Any
) -> None:
    """Pixels are the decoder's output on the codes' unit vectors, from [-1, 1] to 0..255."""
    grid = np.random.default_rng(0).integers(0, 256, (1, 24, 24)).astype(np.uint16)
    with torch.inference_mode():
        codes = unit(model.quantize.embedding.weight)[torch.from_numpy(grid.astype(np.int64))]
        shown = model.decoder(model.post_quant_conv(codes.permute(0, 3, 1, 2)))
        own = model.decode(torch.from_numpy(grid.astype(np.int64)).reshape(1, -1))
    expected = (shown[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    found = tokenizer.decode(grid)[0]
    assert np.abs(found - expected.numpy()).max() < 0.51
    assert torch.allclose(shown, own, atol=1e-4)
    assert found.std() > 1


def test_bfloat16_agrees_with_most_ids(narrow_weights: Path, tokenizer: Tokenizer) -> None:
    """The agreement reported is the share of ids that are float32's; decoding stays float32."""
    half = load_tokenizer("vq16", str(narrow_weights))
    half.setup("cpu", precision="bfloat16")
    exact = tokenizer.encode(BATCH[:1]).tokens
    share = float((half.encode(BATCH[:1]).tokens == exact).mean())
    assert half.precision == "bfloat16"
    assert 0.5 < share < 1.0
    assert half.agreement(BATCH[:1]) == pytest.approx(share, abs=0.005)
    assert np.array_equal(half.decode(exact), tokenizer.decode(exact))


def test_setting_up_again_starts_from_the_weights(
    narrow_weights: Path, tokenizer: Tokenizer
) -> None:
    """After a time in bfloat16 float32 gives float32's ids again: no rounding stays behind."""
    changed = load_tokenizer("vq16", str(narrow_weights))
    changed.setup("cpu", precision="bfloat16")
    changed.setup("cpu", precision="float32")
    ids = tokenizer.encode(BATCH[:1]).tokens
    assert np.array_equal(changed.encode(BATCH[:1]).tokens, ids)


def test_devices_and_precisions_that_are_not_there_are_refused(narrow_weights: Path) -> None:
    """One line with the choices, or with the way to run without a GPU."""
    made = load_tokenizer("vq16", str(narrow_weights))
    with pytest.raises(BadInputError, match=r"'float8'.*float32, bfloat16"):
        made.setup("cpu", precision="float8")
    if not torch.cuda.is_available():
        with pytest.raises(BadInputError, match=r"'cuda'.*--gpus 0"):
            made.setup("cuda")


def test_unknown_tokenizers_are_refused() -> None:
    """An unknown name, and weights for the tokenizer that has its own."""
    with pytest.raises(BadInputError, match=r"'magvit'.*sample, vq16"):
        load_tokenizer("magvit")
    with pytest.raises(BadInputError, match=r"'other\.pt'.*--tokenizer vq16"):
        load_tokenizer("sample", "other.pt")


def test_the_bundled_tokenizer_is_small_and_whole() -> None:
    """At most 8 MB in float16, 4096 codes of 8 numbers, a 24x24 grid of 384 pixels."""
    from safetensors import safe_open

    assert SAMPLE_TOKENIZER.stat().st_size <= 8_000_000
    with safe_open(str(SAMPLE_TOKENIZER), framework="pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert kinds == {"F16"}
    spec = load_tokenizer("sample").spec
    assert (spec.vocabulary, spec.dimension, spec.image_size) == (4096, 8, 384)
    assert (spec.grid_height, spec.grid_width) == (24, 24)
    assert load_tokenizer("sample").weights is None
