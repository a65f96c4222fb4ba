"""FAiD: its forms agree with each other and with loops, on every position; nothing stays behind."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arrag_runtime import Neighbors
from arrag_runtime.faid.attach import Faid, attach
from arrag_runtime.faid.augmenter import Batch, Step
from arrag_runtime.faid.decoder_layer import window_cells
from arrag_runtime.faid.patch_blender import FORMS
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.neighborhood import MISSING
from tests.worlds.janus_world import (
    loop_features,
    narrow_janus,
    some_retrieved,
    some_tokens,
    stirred,
)

GRID, IMAGES, K, PROMPT = (5, 4), 3, 4, 6
CELLS = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def janus() -> Any:
    return narrow_janus()


@pytest.fixture
def model(janus: Any) -> Iterator[Any]:
    """The narrow model; every test leaves it without hooks."""
    yield janus
    for layer in janus.model.language_model.layers:
        layer.self_attn._forward_hooks.clear()


@pytest.fixture(autouse=True)
def start() -> None:
    """Fresh blenders start the same in every order of the tests."""
    torch.manual_seed(4)


def neighbors_of(retrieved: Tensor) -> Neighbors | None:
    """Retrieved tokens [B, K] as a search returns them; None where no picture has any."""
    count = (retrieved != MISSING).sum(1).numpy()
    if not count.any():
        return None
    tokens = np.where(retrieved != MISSING, retrieved, 0).astype(np.uint16)
    return Neighbors.of(tokens, np.zeros(tokens.shape, np.float32), tokens.astype(np.int64), count)


@torch.no_grad()
def prompt_and_tokens(model: Any, tokens: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompts [R, T, D] and of the tokens [R, P, D]; guided rows come last."""
    rng = np.random.default_rng(5)
    rows = len(tokens) * (2 if guided else 1)
    words = torch.from_numpy(rng.integers(0, 96, (rows, PROMPT)))
    prompts = model.get_input_embeddings()(words)
    return prompts, model.prepare_embeddings_for_image_generation(
        tokens.repeat(2 if guided else 1, 1)
    )


@torch.no_grad()
def at_once(model: Any, faid: Faid, tokens: Tensor, retrieved: Tensor, guided: bool) -> Tensor:
    """The hidden states [R, P, D] that predict each position, in the training form."""
    prompts, images = prompt_and_tokens(model, tokens, guided)
    inputs = torch.cat([prompts, images[:, :-1]], 1)
    with faid.whole(retrieved, *GRID, start=PROMPT):
        hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state
    predicting: Tensor = hidden[:, PROMPT - 1 :]
    return predicting


@torch.no_grad()
def step_by_step(model: Any, faid: Faid, tokens: Tensor, retrieved: Tensor, guided: bool) -> Tensor:
    """The same, decoded one position at a time with a cache."""
    from transformers import DynamicCache

    prompts, images = prompt_and_tokens(model, tokens, guided)
    cache, states = DynamicCache(config=model.config.text_config), []
    faid.begin(Batch(len(tokens), guided, *GRID, torch.device("cpu")))
    for position in range(CELLS):
        found = neighbors_of(retrieved[:, position])
        row, col = divmod(position, GRID[1])
        faid.before_forward(Step(position, row, col, tokens[:, :position], found))
        inputs = images[:, position - 1 : position] if position else prompts
        done = model.model.language_model(
            inputs_embeds=inputs, past_key_values=cache, use_cache=True
        )
        states.append(done.last_hidden_state[:, -1])
    faid.end()
    return torch.stack(states, 1)


MIXED = [((1, 2), "softmax"), ((1, 2, 3), "mean"), ((2,), "softmax")]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("hops", "mix"), MIXED)
def test_training_and_decoding_agree_on_every_position(
    model: Any, hops: tuple[int, ...], mix: Any, guided: bool
) -> None:
    faid = stirred(attach(model, hops, 2, mix=mix, form="convolutions", k=K))
    tokens, retrieved = some_tokens(IMAGES, CELLS), some_retrieved(IMAGES, *GRID, K)
    training = at_once(model, faid, tokens, retrieved, guided)
    decoding = step_by_step(model, faid, tokens, retrieved, guided)
    torch.testing.assert_close(decoding, training, atol=1e-5, rtol=0)
    faid.form = "folded"
    for form in (at_once, step_by_step):
        folded = form(model, faid, tokens, retrieved, guided)
        torch.testing.assert_close(folded, training, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["convolutions", "folded"])
@pytest.mark.parametrize(("hops", "mix"), MIXED)
def test_every_position_is_what_loops_give(hops: tuple[int, ...], mix: Any, form: Any) -> None:
    """In float64, where only the model's own float32 norms round; unconditional rows stay plain."""
    model = narrow_janus().double()
    faid = stirred(attach(model, hops, 2, mix=mix, form=form, k=K))
    tokens, retrieved = some_tokens(IMAGES, CELLS), some_retrieved(IMAGES, *GRID, K)
    found = at_once(model, faid, tokens, retrieved, True)
    inputs = torch.cat(prompt_and_tokens(model, tokens, True), 1)
    with torch.no_grad():
        expected = loop_features(model, faid, inputs, retrieved, GRID, PROMPT)[:, PROMPT - 1 : -1]
        plain = model.model.language_model(inputs_embeds=inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    decoded = step_by_step(model, faid, tokens, retrieved, True)
    torch.testing.assert_close(decoded, expected, atol=1e-6, rtol=0)
    apart = (found - plain[:, PROMPT - 1 : -1]).abs().amax(2)
    assert apart[:IMAGES].min() > 0.01
    assert apart[IMAGES:].max() < 1e-6


def test_nothing_of_a_picture_stays_on_the_model(model: Any) -> None:
    tokens, retrieved = some_tokens(IMAGES, CELLS), some_retrieved(IMAGES, *GRID, K)
    inputs = torch.cat(prompt_and_tokens(model, tokens, False), 1)
    language = model.model.language_model
    plain = language(inputs_embeds=inputs).last_hidden_state
    names = {name: vars(module).keys() for name, module in model.named_modules()}
    faid = stirred(attach(model, k=K))
    first = step_by_step(model, faid, tokens, retrieved, True)
    assert torch.equal(language(inputs_embeds=inputs).last_hidden_state, plain)
    other = step_by_step(
        model, faid, some_tokens(1, CELLS, 8), some_retrieved(1, *GRID, K, 9), True
    )
    assert other.shape != first.shape
    assert torch.equal(step_by_step(model, faid, tokens, retrieved, True), first)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == names
    faid.detach()
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(language(inputs_embeds=inputs).last_hidden_state, plain)


def test_an_error_in_a_forward_pass_leaves_the_model_plain(model: Any) -> None:
    faid = attach(model, k=K)
    tokens, retrieved = some_tokens(IMAGES, CELLS), some_retrieved(IMAGES, *GRID, K)
    prompts = prompt_and_tokens(model, tokens, False)[0]
    faid.begin(Batch(2, False, *GRID, torch.device("cpu")))
    faid.before_forward(Step(0, 0, 0, tokens[:2, :0], None))
    with pytest.raises(BadInputError, match="3 rows in a FAiD batch of 2"):
        model.model.language_model(inputs_embeds=prompts)
    faid.end()
    with pytest.raises(BadInputError, match="outside of a batch"):
        faid.before_forward(Step(0, 0, 0, tokens[:, :0], None))
    with pytest.raises(RuntimeError, match="stop"), faid.whole(retrieved, *GRID, start=PROMPT):
        raise RuntimeError("stop")
    faid.begin(Batch(2, False, *GRID, torch.device("cpu")))
    with (
        pytest.raises(BadInputError, match="needs 20 of a 5x4 grid"),
        faid.whole(retrieved[:, 1:], *GRID, start=PROMPT),
    ):
        pass


def test_weights_that_change_are_folded_again(model: Any) -> None:
    faid = stirred(attach(model, k=K))
    tokens, retrieved = some_tokens(1, CELLS), some_retrieved(1, *GRID, K)
    before = step_by_step(model, faid, tokens, retrieved, False)
    stirred(faid, seed=9)
    after = step_by_step(model, faid, tokens, retrieved, False)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(
        after, at_once(model, faid, tokens, retrieved, False), atol=1e-4, rtol=0
    )


def test_gradients_are_the_same_folded_and_unfolded() -> None:
    """In float64, where only the model's own float32 norms round."""
    model = narrow_janus().double()
    faid = stirred(attach(model, k=K)).train()
    tokens, retrieved = some_tokens(2, CELLS), some_retrieved(2, *GRID, K)
    inputs = torch.cat(prompt_and_tokens(model, tokens, False), 1)
    gradients: list[dict[str, Tensor]] = []
    for form in FORMS:
        faid.form = form
        faid.zero_grad(set_to_none=True)
        with faid.whole(retrieved, *GRID, start=PROMPT):
            hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in faid.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(faid.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6 * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("depth", "blenders", "layers"),
    [(24, 2, (0, 12)), (30, 4, (0, 7, 14, 21)), (4, 4, (0, 1, 2, 3))],
)
def test_every_nth_layer_is_augmented(depth: int, blenders: int, layers: tuple[int, ...]) -> None:
    from arrag_runtime.faid.adapter import AdapterSpec

    assert AdapterSpec(8, depth, 9, blenders=blenders).layers == layers


@pytest.mark.parametrize(
    ("hops", "blenders", "message"),
    [
        ((), 2, "hops are empty; give one or more of 1, 2, 3"),
        ((1, 1), 2, "hops 1,1; give one or more of"),
        ((4,), 2, "hops 4; give one or more of"),
        ((1,), 5, "5 blenders in a model of 4 layers; give 1..4"),
    ],
)
def test_what_cannot_be_is_refused(
    model: Any, hops: tuple[int, ...], blenders: int, message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        attach(model, hops, blenders)
    assert not any(m._forward_hooks for m in model.modules())


def test_training_goes_on_after_decoding_in_inference_mode(model: Any) -> None:
    window_cells.cache_clear()
    faid = stirred(attach(model, k=K))
    tokens, retrieved = some_tokens(1, CELLS), some_retrieved(1, *GRID, K)
    with torch.inference_mode():
        step_by_step(model, faid, tokens, retrieved, False)
    inputs = torch.cat(prompt_and_tokens(model, tokens, False), 1)
    for training in (False, True):
        faid.train(training)
        with faid.whole(retrieved, *GRID, start=PROMPT):
            hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state
        hidden.square().sum().backward()
    assert all(p.grad is not None for p in faid.parameters())
