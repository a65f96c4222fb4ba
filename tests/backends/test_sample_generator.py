"""The bundled generator: it loads offline, is small, fits the bundled tokenizer, and draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from arrag_runtime import generate
from arrag_runtime.backends import Backend, load_backend
from arrag_runtime.backends.checkpoint import SAMPLE_GENERATOR
from arrag_runtime.generation.decode_loop import Sampling, probabilities
from arrag_runtime.tokenizers import Tokenizer, load_tokenizer

LIMIT = 15 * 2**20


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend("janus", "sample")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("sample")


def test_what_ships_is_small_and_says_what_it_is() -> None:
    """At most 15 MiB with its card and page of samples; float16; a card with its numbers."""
    files = [path for path in SAMPLE_GENERATOR.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    card = (SAMPLE_GENERATOR.parent / "MODEL_CARD.md").read_text()
    for said in ("held-out", "nats", "samples.jpg", "Limits"):
        assert said in card
    assert json.loads((SAMPLE_GENERATOR / "config.json").read_text())["model_type"] == "janus"


def test_it_fits_the_bundled_tokenizer(backend: Backend, tokenizer: Tokenizer) -> None:
    """The same codes, and the same pictures of the same tokens within rounding."""
    np.testing.assert_array_equal(backend.codebook(), tokenizer.codebook())
    assert backend.grid == (tokenizer.spec.grid_height, tokenizer.spec.grid_width)
    grid = np.random.default_rng(0).integers(0, 4096, (1, 24, 24)).astype(np.uint16)
    tokenizer.setup("cpu", precision="float32")
    apart = np.abs(backend.pixels(grid).astype(int) - tokenizer.decode(grid).astype(int))
    assert apart.max() <= 1


def test_the_prompt_decides_where_a_picture_begins(backend: Backend) -> None:
    """It has learned: another prompt, other probabilities, far from uniform ones."""
    prompts = ["a photo of a t-shirt", "a photo of Oatly Oat Milk"]
    with torch.inference_mode():
        logits = backend.start(prompts, guided=False).forward(None)
        p = probabilities(logits, Sampling(1.0, 1.0, (0, 1)))
    assert float((p[0] - p[1]).abs().sum()) > 0.05
    entropy = -(p * p.log()).sum(dim=-1)
    assert float(entropy.max()) < np.log(4096) - 0.3


@pytest.mark.slow
def test_it_draws(backend: Backend, tmp_path: Path) -> None:
    """A whole picture, the same for the same seed."""
    first, again = (generate(backend, "a photo of a t-shirt", seed=1).tokens for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (1, 24, 24)
    shown = backend.pixels(first)
    assert shown.shape == (1, 384, 384, 3)
    assert shown.std() > 10
