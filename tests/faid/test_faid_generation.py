"""FAiD in the decode loop: what is drawn step by step is what the training form predicts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrag_runtime import Retriever, attach_faid, generate
from arrag_runtime.backends.janus import JanusBackend
from arrag_runtime.faid.adapter import Adapter, model_codebook, write_adapter
from arrag_runtime.faid.attach import Faid, attach
from arrag_runtime.format.neighborhood import MISSING
from tests.worlds.janus_world import stirred
from tests.worlds.narrow_janus import narrow_janus, text_tokenizer
from tests.worlds.patch_world import build_index, make_world

PROMPTS, K = ("a photo of a hat", "two"), 5


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    made = make_world(tmp_path_factory.mktemp("world") / "db", shards=2, images=5)
    build_index(made, "flat", kind="flat")
    return Retriever.open(made.layout.root, k=12)


@pytest.fixture(scope="module")
def backend() -> JanusBackend:
    words = text_tokenizer()
    return JanusBackend(narrow_janus(words), words, "narrow")


@pytest.fixture(scope="module")
def adapter(backend: JanusBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's file with random blenders."""
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    faid = stirred(attach(backend.model))
    faid.detach()
    tensors = {f"faid.{name}": tensor for name, tensor in faid.state_dict().items()}
    write_adapter(path, Adapter(faid.spec, tensors, model_codebook(backend.model)))
    return path


@pytest.fixture
def faid(backend: JanusBackend, adapter: Path) -> Iterator[Faid]:
    attached = attach_faid(backend.model, adapter, k=K)
    yield attached
    attached.detach()


def draw(backend: JanusBackend, prompts: Any, retriever: Retriever, faid: Faid, **more: Any) -> Any:
    made = generate(backend, prompts, retriever=retriever, augmenters=(faid,), **more)
    return made.tokens


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_training_form(
    backend: JanusBackend, retriever: Retriever, faid: Faid
) -> None:
    grids = draw(backend, PROMPTS, retriever, faid, temperature=0.0, guidance=3.0)
    retrieved = np.full((2, 49, K), MISSING)
    for position in range(49):
        found = retriever.at(grids, *divmod(position, 7))
        assert found is not None
        real = np.arange(K) < found.count[:, None]
        retrieved[:, position] = np.where(real, found.tokens[:, :K], MISSING)
    ids, mask = backend.prompt_ids(PROMPTS)
    kept = torch.isin(ids, torch.tensor([ids[0, -1], backend.tokenizer.bos_token_id]))
    ids = torch.cat([ids, torch.where(kept, ids, backend.tokenizer.pad_token_id)])
    tokens = torch.from_numpy(grids.reshape(2, 49).astype(np.int64)).repeat(2, 1)
    images = backend.model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    inputs = torch.cat([backend.model.get_input_embeddings()(ids), images], 1)
    seen = torch.nn.functional.pad(mask.repeat(2, 1), (0, 48), value=1)
    with faid.whole(torch.from_numpy(retrieved), 7, 7, start=ids.shape[1]):
        states = backend.model.model.language_model(inputs_embeds=inputs, attention_mask=seen)
    last = states.last_hidden_state[:, ids.shape[1] - 1 :]
    cond, uncond = backend.model.model.generation_head(last).chunk(2)
    guided = uncond + 3.0 * (cond - uncond)
    likeliest = guided.argmax(-1)
    assert (likeliest == tokens[:2]).float().mean() == 1


def test_a_batch_is_drawn_as_its_pictures_one_by_one(
    backend: JanusBackend, retriever: Retriever, faid: Faid
) -> None:
    together = draw(backend, PROMPTS, retriever, faid, seed=4, batch_size=2)
    alone = draw(backend, PROMPTS, retriever, faid, seed=4, batch_size=1)
    assert np.array_equal(together, alone)


def test_the_model_draws_plainly_before_and_after(
    backend: JanusBackend, retriever: Retriever, adapter: Path
) -> None:
    plain = generate(backend, PROMPTS, seed=2).tokens
    attached = attach_faid(backend.model, adapter, k=K)
    changed = draw(backend, PROMPTS, retriever, attached, seed=2)
    assert (changed != plain).mean() > 0.5
    assert np.array_equal(generate(backend, PROMPTS, seed=2).tokens, plain)
    attached.detach()
    assert np.array_equal(generate(backend, PROMPTS, seed=2).tokens, plain)
