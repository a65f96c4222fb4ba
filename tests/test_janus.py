"""The backend janus: against transformers' own `generate`, batches against loops, checkpoints."""

from typing import Any

import numpy as np
import pytest
import torch

from arrag_runtime import generate
from arrag_runtime.backends.janus import TEMPLATE, JanusBackend
from tests.narrow_janus import narrow_janus, text_tokenizer

PROMPTS = ("a photo of a hat", "a red shoe on grass", "two cats")


@pytest.fixture(scope="module")
def words() -> Any:
    return text_tokenizer()


@pytest.fixture(scope="module")
def backend(words: Any) -> JanusBackend:
    return JanusBackend(narrow_janus(words), words, "narrow")


@pytest.fixture(scope="module")
def exact(words: Any) -> JanusBackend:
    """In float64, so that what is equal in exact arithmetic is not told apart by rounding."""
    return JanusBackend(narrow_janus(words).double(), words, "narrow")


def by_transformers(backend: JanusBackend, prompts: tuple[str, ...], guidance: float) -> Any:
    """Greedy image tokens of `generate` in image mode, prompts padded on the left."""
    words = backend.tokenizer
    words.padding_side = "left"
    texts = [TEMPLATE.format(prompt=prompt) for prompt in prompts]
    read = words(texts, padding=True, return_tensors="pt")
    model = backend.model
    model.generation_config.generation_kwargs = {
        "boi_token_id": words.convert_tokens_to_ids("<begin_of_image>")
    }
    model.generation_config.pad_token_id = words.pad_token_id
    model.generation_config.bos_token_id = words.bos_token_id
    return model.generate(
        input_ids=read["input_ids"],
        attention_mask=read["attention_mask"],
        generation_mode="image",
        do_sample=False,
        guidance_scale=guidance,
    ).numpy()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("guidance", [5.0, 2.0])
def test_greedy_tokens_are_those_of_transformers_generate(
    backend: JanusBackend, prompts: tuple[str, ...], guidance: float
) -> None:
    """One prompt, and three of different lengths padded beside each other."""
    ours = generate(backend, prompts, guidance=guidance, temperature=0).tokens
    theirs = by_transformers(backend, prompts, guidance)
    np.testing.assert_array_equal(ours.reshape(len(prompts), -1), theirs)
    assert len(np.unique(theirs)) > 3
    if len(prompts) > 1:
        assert len(np.unique(theirs, axis=0)) == len(prompts)
