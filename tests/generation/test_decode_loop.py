"""Decoding with a database: λ = 0, what each step sees, and the search beside the forward pass."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from arrag_runtime import Neighbors, PatchIndex, Retriever, daid, generate
from arrag_runtime.backends.janus import JanusBackend
from arrag_runtime.daid import DaidSettings
from arrag_runtime.faid.augmenter import Batch, Step
from arrag_runtime.format.errors import BadInputError
from tests.worlds.narrow_janus import narrow_janus, text_tokenizer
from tests.worlds.patch_world import World, build_index, make_world

PROMPTS = ("a photo of a hat", "two cats")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world") / "db", shards=2, images=5)
    build_index(made, "flat", kind="flat")
    return made


@pytest.fixture(scope="module")
def retriever(world: World) -> Retriever:
    return Retriever.open(world.layout.root, k=20)


@pytest.fixture(scope="module")
def backend() -> JanusBackend:
    words = text_tokenizer()
    return JanusBackend(narrow_janus(words), words, "narrow")


@torch.inference_mode()
def plain_loop(backend: JanusBackend, prompts: Sequence[str], seed: int) -> Any:
    """A decode loop without any of retrieval, one picture after another."""
    grids = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + number)
        running, newest, chosen = backend.start([prompt] * 2, guided=True), None, []
        for _ in range(49):
            cond, uncond = running.forward(newest).chunk(2)
            p = (uncond + (cond - uncond) * 5.0)[:1].float().softmax(dim=-1)
            clocks = torch.empty_like(p).exponential_(generator=generator)
            newest = (p / clocks).argmax(dim=-1).repeat(2)
            chosen.append(int(newest[0]))
        grids.append(chosen)
    return np.array(grids).reshape(-1, 7, 7)


@pytest.mark.parametrize("merge", daid.MERGES)
def test_without_weight_the_tokens_are_a_plain_loops(
    backend: JanusBackend, retriever: Retriever, merge: daid.Merge
) -> None:
    """λ = 0, everything searched and merged: the same picture bit for bit; with λ another."""
    plain = generate(backend, PROMPTS[0], seed=3)
    searched = CountingRetriever(retriever)
    same = generate(
        backend, PROMPTS[0], seed=3, retriever=searched, daid=DaidSettings(lam=0.0, merge=merge)
    )
    np.testing.assert_array_equal(same.tokens, plain.tokens)
    assert searched.asked == [divmod(position, 7) for position in range(49)]
    np.testing.assert_array_equal(plain.tokens, plain_loop(backend, PROMPTS[:1], 3))
    mixed = generate(
        backend, PROMPTS[0], seed=3, retriever=retriever, daid=DaidSettings(lam=0.9, merge=merge)
    )
    assert (mixed.tokens != plain.tokens).any()


class CountingRetriever(Retriever):
    """Notes the positions that were searched for, and the grids as they stood."""

    def __init__(self, inner: Retriever) -> None:
        super().__init__(inner.index, inner.k)
        self.asked: list[tuple[int, int]] = []
        self.grids: list[Any] = []
        self.threads: set[int] = set()

    def at(self, grids: Any, row: int, col: int, *, exclude: Any = None) -> Neighbors | None:
        self.asked.append((row, col))
        self.grids.append(grids.copy())
        self.threads.add(threading.get_ident())
        return super().at(grids, row, col)


def test_every_step_searches_with_the_tokens_before_it(
    backend: JanusBackend, retriever: Retriever
) -> None:
    """Each picture's own context, complete up to the position asked for."""
    searched = CountingRetriever(retriever)
    done = generate(backend, PROMPTS, seed=1, retriever=searched, daid=DaidSettings(lam=0.3))
    final = done.tokens.reshape(2, -1)
    for position, grids in enumerate(searched.grids):
        flat = grids.reshape(2, -1)
        np.testing.assert_array_equal(flat[:, :position], final[:, :position])


def test_mixing_is_merging_with_what_was_retrieved(
    backend: JanusBackend, retriever: Retriever
) -> None:
    """The loop's choices replayed: forward pass, `daid.merge`, the same draw."""
    settings = DaidSettings(lam=0.5)
    done = generate(backend, PROMPTS[0], seed=4, retriever=retriever, daid=settings)
    running, newest = backend.start(PROMPTS[:1], guided=True), None
    generator, grid = torch.Generator().manual_seed(4), np.zeros((1, 7, 7), np.uint16)
    for position in range(49):
        row, col = divmod(position, 7)
        with torch.inference_mode():
            cond, uncond = running.forward(newest).chunk(2)
            p = (uncond + (cond - uncond) * 5.0).float().softmax(dim=-1)
            p = daid.merge(p, retriever.at(grid, row, col), lam=0.5)
            clocks = torch.empty_like(p).exponential_(generator=generator)
            newest = (p / clocks).argmax(dim=-1)
        grid[0, row, col] = int(newest)
    np.testing.assert_array_equal(done.tokens, grid)


class WaitingRetriever(CountingRetriever):
    """Answers only once the model has begun the forward pass of the same step."""

    def __init__(self, inner: Retriever) -> None:
        super().__init__(inner)
        self.forward_began = threading.Semaphore(0)

    def at(self, grids: Any, row: int, col: int, *, exclude: Any = None) -> Neighbors | None:
        assert self.forward_began.acquire(timeout=60), "the forward pass waited for the search"
        return super().at(grids, row, col)


def test_the_search_runs_beside_the_forward_pass(
    backend: JanusBackend, retriever: Retriever
) -> None:
    """A search that ends only after the model has started; and no thread stays behind."""
    searched = WaitingRetriever(retriever)
    first_layer = backend.model.model.language_model.layers[0]
    hook = first_layer.register_forward_hook(lambda *_: searched.forward_began.release())
    try:
        generate(backend, PROMPTS[0], retriever=searched, daid=DaidSettings())
    finally:
        hook.remove()
    assert len(searched.asked) == 49
    assert threading.get_ident() not in searched.threads
    assert not [t for t in threading.enumerate() if t.name.startswith("arrag-search")]


class Recorder:
    """An augmenter that notes what the loop tells it, and may fail."""

    k = 5

    def __init__(self, model: Any, fail_at: int | None = None) -> None:
        self.events: list[Any] = []
        self.steps: list[Step] = []
        self._fail_at = fail_at
        self._hook = model.register_forward_pre_hook(lambda *_: self.events.append("forward"))

    def begin(self, batch: Batch) -> None:
        self.events.append(batch)

    def before_forward(self, step: Step) -> None:
        self.events.append(step.position)
        self.steps.append(step)
        if step.position == self._fail_at:
            raise RuntimeError("broken")

    def end(self) -> None:
        self.events.append("end")
        self._hook.remove()


def test_augmenters_get_their_neighbours_before_each_forward_pass(
    backend: JanusBackend, retriever: Retriever
) -> None:
    """Begin, then for every position the step and one forward pass, then the end."""
    recorder = Recorder(backend.model.model.language_model)
    done = generate(backend, PROMPTS, seed=2, retriever=retriever, augmenters=(recorder,))
    first, *middle, last = recorder.events
    assert first == Batch(2, True, 7, 7, backend.device)
    assert first.rows == 4
    assert last == "end"
    assert middle == [event for position in range(49) for event in (position, "forward")]
    for step in recorder.steps:
        np.testing.assert_array_equal(
            step.tokens.numpy(), done.tokens.reshape(2, -1)[:, : step.position]
        )
        assert (step.row, step.col) == divmod(step.position, 7)
        assert step.neighbors is not None
        assert step.neighbors.tokens.shape == (2, 20)
    plain = generate(backend, PROMPTS, seed=2)
    np.testing.assert_array_equal(done.tokens, plain.tokens)


def test_augmenters_are_ended_after_an_error(backend: JanusBackend, retriever: Retriever) -> None:
    """Nothing of a batch is left when decoding breaks off."""
    recorder = Recorder(backend.model.model.language_model, fail_at=10)
    with pytest.raises(RuntimeError, match="broken"):
        generate(backend, PROMPTS[0], retriever=retriever, augmenters=(recorder,))
    assert recorder.events[-1] == "end"
    assert not [t for t in threading.enumerate() if t.name.startswith("arrag-search")]


def test_an_adapter_that_wants_more_neighbours_is_refused(
    backend: JanusBackend, world: World
) -> None:
    """With both numbers."""
    recorder = Recorder(backend.model.model.language_model)
    few = Retriever(PatchIndex.open(world.layout.root), 3)
    with pytest.raises(BadInputError, match=r"3 neighbours are retrieved.*takes 5"):
        generate(backend, PROMPTS[0], retriever=few, augmenters=(recorder,))
    recorder.end()
