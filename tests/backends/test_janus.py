"""The backend janus: against transformers' own `generate`, batches against loops, checkpoints."""

from typing import Any

import numpy as np
import pytest
import torch

from arrag_runtime import generate
from arrag_runtime.backends.janus import TEMPLATE, JanusBackend
from arrag_runtime.daid import DaidSettings
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.generation.decode_loop import Sampling, sample
from tests.worlds.narrow_janus import BOS, narrow_janus, text_tokenizer

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


def test_a_batch_is_its_pictures(exact: JanusBackend) -> None:
    """Several prompts x several images in one batch are those decoded one by one; all differ."""
    together = generate(exact, PROMPTS, images=2, seed=5)
    assert together.prompts == tuple(p for p in PROMPTS for _ in range(2))
    assert together.seeds == tuple(range(5, 11))
    alone = [
        generate(exact, prompt, seed=seed).tokens[0]
        for prompt, seed in zip(together.prompts, together.seeds, strict=True)
    ]
    np.testing.assert_array_equal(together.tokens, np.stack(alone))
    assert len(np.unique(together.tokens.reshape(6, -1), axis=0)) == 6
    split = generate(exact, PROMPTS, images=2, seed=5, batch_size=4)
    np.testing.assert_array_equal(split.tokens, together.tokens)


def test_a_seed_decides_the_picture(backend: JanusBackend) -> None:
    """The same seed, the same picture; another one, another."""
    first, again, other = (generate(backend, PROMPTS[0], seed=s).tokens for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_without_guidance_only_the_prompt_speaks(exact: JanusBackend) -> None:
    """w = 1 decodes B rows; the tokens are those of guidance that weighs the prompt alone."""
    alone = generate(exact, PROMPTS, guidance=1.0, temperature=0).tokens
    almost = generate(exact, PROMPTS, guidance=1.0 + 1e-12, temperature=0).tokens
    np.testing.assert_array_equal(alone, almost)


def test_sampling_follows_the_probabilities() -> None:
    """The frequencies of 20,000 draws are the probabilities, within five standard errors."""
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(1.0, 1.0, (0,))
    draws = [int(sample(p, sampling, [generator])) for _ in range(20_000)]
    counts = np.bincount(draws, minlength=5) / len(draws)
    error = np.sqrt(p[0].numpy() * (1 - p[0].numpy()) / len(draws))
    assert (np.abs(counts - p[0].numpy()) <= 5 * error).all()


def test_pictures_are_those_of_the_tokenizers_decoder(backend: JanusBackend) -> None:
    """Normalised codes through the decoder, scaled from [-1, 1] to bytes."""
    grid = np.random.default_rng(0).integers(0, 24, (2, 7, 7)).astype(np.uint16)
    shown = backend.pixels(grid)
    assert shown.shape == (2, 112, 112, 3)
    vq = backend.model.model.vqmodel
    codes = torch.from_numpy(backend.codebook()[grid[1].astype(int)]).permute(2, 0, 1)[None]
    with torch.no_grad():
        decoded = vq.decoder(vq.post_quant_conv(codes))[0].permute(1, 2, 0).numpy()
    wanted = np.round((decoded.clip(-1, 1) + 1) * 127.5)
    assert np.abs(shown[1].astype(float) - wanted).max() <= 1


def test_the_template_is_the_processors(words: Any) -> None:
    """What deepseek-ai's processor writes for one turn of a user, and the mark of a picture."""
    assert TEMPLATE.format(prompt="x") == "<|User|>: x\n\n<|Assistant|>:<begin_of_image>"
    backend = JanusBackend(narrow_janus(words), words, "narrow")
    ids, mask = backend.prompt_ids(["x", " xyz "])
    assert ids[0, 0] == words.pad_token_id
    assert words.decode(ids[1].tolist()) == f"{BOS}{TEMPLATE.format(prompt='xyz')}"
    assert mask.tolist()[1] == [1] * ids.shape[1]
    assert mask[0].sum() == len(words(TEMPLATE.format(prompt="x"))["input_ids"])
    cut, _ = backend.prompt_ids(["xyzxyz"], longest=2)
    first = words.decode(words("xyzxyz", add_special_tokens=False)["input_ids"][:2])
    assert words.decode(cut[0].tolist()) == f"{BOS}{TEMPLATE.format(prompt=first)}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ""}, "a prompt is empty"),
        ({"prompts": "hat " * 1200}, r"has room for \d+ beside 49 image tokens"),
        ({"images": 0}, "0 pictures"),
        ({"temperature": -1.0}, "temperature -1.0 is below 0"),
        ({"daid": DaidSettings()}, "search a database"),
    ],
)
def test_what_cannot_be_generated_is_one_line(
    backend: JanusBackend, change: dict[str, Any], message: str
) -> None:
    """The value seen and the next step, before anything is generated."""
    settings: dict[str, Any] = {"prompts": PROMPTS[0]} | change
    with pytest.raises(BadInputError, match=message):
        generate(backend, **settings)
