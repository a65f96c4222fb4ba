"""The decode loop: prompts in, token grids out, with retrieval on the way where it is wanted.

A step predicts one position: search for it and run the model's forward pass, apply guidance, mix
in what was found, sample. The search depends only on tokens that exist when the forward pass
starts, so a second thread searches meanwhile (faiss and torch both release the interpreter). An
`Augmenter` needs its neighbours inside the forward pass; then the search comes first.

Source: AR-RAG (arXiv 2506.06962), sections 3.2 and 3.3; guidance as Janus-Pro's.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arrag_runtime import daid
from arrag_runtime.backends import Backend
from arrag_runtime.daid import DaidSettings
from arrag_runtime.faid.augmenter import Augmenter, Batch, Step
from arrag_runtime.search.neighbors import Neighbors
from arrag_runtime.search.retriever import Retriever


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    guidance: float
    """w of uncond + w · (cond - uncond); 1 decodes without the unconditional rows."""
    temperature: float
    """Of the softmax after guidance; 0 takes the likeliest token."""
    seeds: tuple[int, ...]
    """One per picture, each with a generator of its own, so that a picture does not depend on those
    decoded beside it."""


@dataclass(frozen=True)
class Choice:
    """What happened at one step, for whoever watches; tensors are on the model's device."""

    row: int
    col: int
    """Row and column of the position in the token grid."""
    tokens: torch.Tensor
    """The tokens chosen, long [B]."""
    p_model: torch.Tensor
    """Their probabilities before mixing, [B]."""
    p_mixed: torch.Tensor
    """Their probabilities after mixing, [B]."""
    neighbors: Neighbors | None
    """What was retrieved, or None."""


@torch.inference_mode()
def decode_grids(
    backend: Backend,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    retriever: Retriever | None = None,
    mixing: DaidSettings | None = None,
    augmenters: Sequence[Augmenter] = (),
    progress: Callable[[int], None] = lambda _done: None,
    watch: Callable[[Choice], None] | None = None,
) -> npt.NDArray[np.uint16]:
    """Decode one picture per prompt; returns token grids uint16 [B, h, w].

    retriever: searched at every position, for `mixing` (DAiD) and for augmenters; None searches
    nowhere. progress: called after each step with the number of positions done. watch: called after
    each step with what was chosen.
    """
    height, width = backend.grid
    guided = sampling.guidance != 1
    device = backend.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in sampling.seeds]
    chosen = torch.zeros((len(prompts), height * width), dtype=torch.long, device=device)
    running = backend.start(prompts, guided=guided)
    batch = Batch(len(prompts), guided, height, width, device)
    searcher = Searcher(retriever, (len(prompts), height, width))
    try:
        for augmenter in augmenters:
            augmenter.begin(batch)
        newest = None
        for position in range(height * width):
            row, col = divmod(position, width)
            search = searcher.start(newest, row, col)
            if augmenters:
                step = Step(position, row, col, chosen[:, :position], search.result())
                for augmenter in augmenters:
                    augmenter.before_forward(step)
            logits = running.forward(newest)
            p_model = probabilities(logits, sampling)
            p_mixed = p_model if mixing is None else daid.mix(p_model, search.result(), mixing)
            newest = sample(p_mixed, sampling, generators)
            chosen[:, position] = newest
            if watch is not None:
                at = newest[:, None]
                before, after = p_model.gather(1, at)[:, 0], p_mixed.gather(1, at)[:, 0]
                watch(Choice(row, col, newest, before, after, search.result()))
            progress(position + 1)
    finally:
        searcher.close()
        for augmenter in augmenters:
            augmenter.end()
    grids: npt.NDArray[np.uint16] = chosen.cpu().numpy().astype(np.uint16)
    return grids.reshape(-1, height, width)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Softmax after guidance, float32 (float64 for a float64 model) [B, V]."""
    if sampling.guidance != 1:
        with_prompt, without = logits.chunk(2)
        logits = without + (with_prompt - without) * sampling.guidance
    if logits.dtype != torch.float64:
        logits = logits.float()
    return (logits / (sampling.temperature or 1.0)).softmax(dim=-1)


def sample(
    p: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """A token for each row, long [B]: the likeliest at temperature 0, else drawn from p.

    The draw is a race of exponential clocks: the first to ring at rate p_v is v with probability
    p_v. Each row has clocks of its own generator, whatever rows stand beside it.
    """
    if sampling.temperature == 0:
        return p.argmax(dim=-1)
    clocks = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    for row, generator in zip(clocks, generators, strict=True):
        row.exponential_(generator=generator)
    return (p / clocks.clamp_min(1e-20)).argmax(dim=-1)


class Searcher:
    """Searches for the next position in a thread of its own while the model runs."""

    def __init__(self, retriever: Retriever | None, shape: tuple[int, int, int]) -> None:
        self._retriever = retriever
        self._grids = np.zeros(shape, dtype=np.uint16)
        self._thread = ThreadPoolExecutor(1, "arrag-search") if retriever else None

    def close(self) -> None:
        """Wait for a search that is going on, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def start(self, newest: torch.Tensor | None, row: int, col: int) -> "Future[Neighbors | None]":
        """Search for (row, col), given the tokens [B] of the position before; None at the first."""
        if self._thread is None:
            nothing: Future[Neighbors | None] = Future()
            nothing.set_result(None)
            return nothing
        arriving, ready = None, None
        if newest is not None:
            # On a GPU the copy is queued before the forward pass, and only the thread waits for it.
            arriving = newest.to("cpu", non_blocking=True)
            if newest.is_cuda:
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
        return self._thread.submit(self._search, arriving, ready, row, col)

    def _search(
        self, arriving: torch.Tensor | None, ready: Any | None, row: int, col: int
    ) -> Neighbors | None:
        if ready is not None:
            ready.synchronize()
        if arriving is not None:
            before = row * self._grids.shape[2] + col - 1
            self._grids.reshape(len(self._grids), -1)[:, before] = arriving.numpy()
        assert self._retriever is not None
        return self._retriever.at(self._grids, row, col)
