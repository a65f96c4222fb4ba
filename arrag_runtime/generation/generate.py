"""Prompts in, pictures' token grids out: the decode loop with its settings checked.

Nothing heavy is imported until `generate` is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arrag_runtime.backends import Backend
from arrag_runtime.daid import DaidSettings
from arrag_runtime.faid.augmenter import Augmenter
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.search.retriever import Retriever

if TYPE_CHECKING:
    from arrag_runtime.generation.decode_loop import Choice


@dataclass(frozen=True)
class Generated:
    """The token grids of N pictures; the pictures of one prompt stand in a row."""

    tokens: npt.NDArray[np.uint16]
    """uint16 [N, h, w]."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    """One prompt and one seed per picture."""


def generate(
    backend: Backend,
    prompts: str | Sequence[str],
    *,
    images: int = 1,
    seed: int = 0,
    retriever: Retriever | None = None,
    daid: DaidSettings | None = None,
    augmenters: Sequence[Augmenter] = (),
    guidance: float | None = None,
    temperature: float | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    watch: "Callable[[int, Choice], None] | None" = None,
) -> Generated:
    """Generate `images` pictures of each prompt with a loaded generator (`load_backend`).

    seed: picture number i of all has seed + i, so that it is the same in any batch.
    retriever: where to search; needed by daid and by augmenters.
    daid: how DAiD mixes in what is retrieved (AR-RAG, section 3.2); None leaves it out.
    augmenters: what changes forward passes, such as FAiD (AR-RAG, section 3.3).
    guidance: the weight of classifier-free guidance, 1 is off; None takes the generator's own.
    temperature: of sampling, 0 takes the likeliest token; None takes the generator's own.
    batch_size: pictures decoded together.
    progress: called with (tokens done, tokens in all).
    watch: called after each step with the number of the batch's first picture and what was chosen
    (`decode_loop.Choice`).

    Raises BadInputError for settings out of range, and when memory runs out.
    """
    from arrag_runtime.device import out_of_memory
    from arrag_runtime.generation.decode_loop import Sampling, decode_grids

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    guidance = backend.guidance if guidance is None else guidance
    temperature = backend.temperature if temperature is None else temperature
    if not texts or not all(text.strip() for text in texts):
        raise BadInputError("a prompt is empty; say what to draw, like --prompt 'a photo of a hat'")
    if images < 1 or batch_size < 1:
        raise BadInputError(f"{images} pictures in batches of {batch_size}; use 1 or more of both")
    if not temperature >= 0:
        raise BadInputError(f"temperature {temperature} is below 0; use 0 for the likeliest token")
    wanted = max((augmenter.k for augmenter in augmenters), default=0)
    if retriever is None and (daid is not None or wanted):
        raise BadInputError("DAiD and FAiD search a database; name one with --db")
    if retriever is not None and retriever.k < wanted:
        raise BadInputError(
            f"{retriever.k} neighbours are retrieved, but the adapter takes {wanted}; raise -k"
        )
    texts = [text for text in texts for _ in range(images)]
    seeds = tuple(range(seed, seed + len(texts)))
    steps = backend.grid[0] * backend.grid[1]
    grids = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        size = len(texts[part])

        def show(done: int, before: int = start * steps, size: int = size) -> None:
            progress(before + size * done, len(texts) * steps)

        with out_of_memory(f"decoding {size} pictures at once on {backend.device}"):
            grids.append(
                decode_grids(
                    backend,
                    texts[part],
                    Sampling(guidance, temperature, seeds[part]),
                    retriever=retriever,
                    mixing=daid,
                    augmenters=augmenters,
                    progress=show,
                    watch=None if watch is None else partial(watch, start),
                )
            )
    return Generated(np.concatenate(grids), tuple(texts), seeds)
