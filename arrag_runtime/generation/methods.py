"""What `arrag generate` does: load a generator, check that the database fits it, generate, account.

In: `GenerateSettings`. Out: a `Session` with the pictures of each method, and on request their trace.
Everything that can be wrong is found before the first token is drawn.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.backends import Backend, Pixels, load_backend
from arrag_runtime.backends.compatibility import require_fit
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.generation.augmenter import Augmenter
from arrag_runtime.generation.copied_runs import CopyRun, longest_copy
from arrag_runtime.generation.generate import Generated, generate
from arrag_runtime.generation.picture_grid import comparison, grid_picture, save_png
from arrag_runtime.generation.settings import GenerateSettings
from arrag_runtime.generation.trace import Origin, Source, Tracer, source_weights, trace_json
from arrag_runtime.generation.trace_sheet import Traced, draw_trace, heaviest_sources
from arrag_runtime.search.index_group import IndexGroup
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.search.retriever import Retriever

LABELS = {"plain": "plain", "daid": "DAiD", "faid": "FAiD"}
MOST_TRACED_ROWS = 8
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MethodResult:
    """One method's pictures. pixels: uint8 [N, H, W, 3]. seconds: of decoding tokens."""

    method: str
    generated: Generated
    pixels: Pixels
    seconds: float
    tracer: Tracer | None


@dataclass(frozen=True)
class Session:
    """What came out: a result a method. `backend` is kept to draw sources for the trace."""

    settings: GenerateSettings
    backend: Backend
    index: str | None
    results: tuple[MethodResult, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """The (rows, columns) of token grids."""
        return self.backend.grid

    def save(self, path: Path) -> None:
        """Write the picture: all pictures in a grid, or the methods side by side."""
        if len(self.results) == 1:
            save_png(grid_picture(self.results[0].pixels), path)
            return
        columns = [(LABELS[result.method], result.pixels) for result in self.results]
        save_png(comparison(columns, self.results[0].generated.prompts), path)

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "model": self.settings.model,
            "mode": self.settings.mode,
            "device": str(self.backend.device),
            "index": self.index,
            "methods": [
                {
                    "method": result.method,
                    "seconds": result.seconds,
                    "tokens_per_second": result.generated.tokens.size / result.seconds,
                    "images": [
                        {"prompt": prompt, "seed": seed, "tokens": grid.tolist()}
                        for prompt, seed, grid in zip(
                            result.generated.prompts,
                            result.generated.seeds,
                            result.generated.tokens,
                            strict=True,
                        )
                    ],
                }
                for result in self.results
            ],
        }

    def to_text(self) -> str:
        """A line a method."""
        return "\n".join(
            f"{LABELS[result.method]}: {len(result.pixels)} pictures, {result.seconds:.1f} s,"
            f" {result.generated.tokens.size / result.seconds:.0f} tokens/s"
            for result in self.results
        )

    @property
    def _traced(self) -> tuple[MethodResult, Tracer]:
        """The result that is traced: DAiD's where several retrieve."""
        for result in self.results:
            if result.tracer is not None:
                return result, result.tracer
        raise BadInputError("nothing was traced; retrieve something, with --mode daid")

    def sources(self) -> list[Source]:
        """All pictures behind the traced ones, by number of their database and image id."""
        _, tracer = self._traced
        return sorted({source for trace in tracer.traces for source in source_weights(trace)})

    def traced(
        self, origins: Mapping[Source, Origin], grids: Mapping[Source, npt.NDArray[np.uint16]]
    ) -> "Told":
        """The trace, told with what the databases know of the sources: rows and token grids."""
        result, tracer = self._traced
        copies = [longest_copy(grid, grids) for grid in result.generated.tokens]
        return Told(self, result, tracer, origins, grids, copies)


@dataclass(frozen=True)
class Told:
    """A trace with the origins of its sources."""

    session: Session
    result: MethodResult
    tracer: Tracer
    origins: Mapping[Source, Origin]
    grids: Mapping[Source, npt.NDArray[np.uint16]]
    copies: Sequence[CopyRun | None]

    def to_json(self) -> dict[str, Any]:
        """What `--trace` writes."""
        settings = self.session.settings
        about: dict[str, Any] = {
            "method": self.result.method,
            "model": settings.model,
            "databases": [str(database) for database in settings.databases],
            "index": self.session.index,
        }
        if self.result.method == "daid":
            mixing = settings.daid
            about |= {"k": settings.k, "lambda": mixing.lam, "tau": mixing.tau}
            about |= {"merge": mixing.merge, "entropy_above": mixing.entropy_above}
        return trace_json(
            self.result.generated, self.tracer.traces, self.origins, self.copies, about
        )

    def draw(self, path: Path) -> None:
        """What `--trace-sheet` draws: the first eight pictures and their heaviest sources."""
        traces = self.tracer.traces[:MOST_TRACED_ROWS]
        wanted = {source for trace in traces for source in heaviest_sources(trace)}
        shown = {
            source: self.session.backend.pixels(self.grids[source][None])[0]
            for source in sorted(wanted & self.grids.keys())
        }
        generated = self.result.generated
        rows = [
            Traced(
                generated.prompts[i],
                generated.seeds[i],
                self.result.pixels[i],
                traces[i],
                self.copies[i],
            )
            for i in range(len(traces))
        ]
        title = f"Where the tokens came from: {LABELS[self.result.method]}, {self.session.settings.model}"
        save_png(draw_trace(rows, self.session.grid, shown, self.origins, title), path)


def run(settings: GenerateSettings, show: Show = lambda *_: None) -> Session:
    """Generate. show: called with (what is being done, done, in all).

    Raises BadInputError or IncompatibleError, with everything named, before the first token.
    """
    retrieves = settings.mode != "plain"
    index = None
    if retrieves:
        opened = [PatchIndex.open(database, settings.index) for database in settings.databases]
        index = IndexGroup(opened)
    backend = load_backend(
        "janus",
        settings.model,
        device=settings.device or default_device(),
        precision=settings.precision,
    )
    if index is not None:
        for database in settings.databases:
            require_fit(database, backend, index.manifest.keys.neighborhood)
    if settings.adapter is not None:
        with _adapter(backend, settings):
            pass  # an adapter that does not fit is refused before anything is generated
    results = tuple(
        _run_method(method, backend, index, settings, show) for method in settings.methods
    )
    return Session(settings, backend, index.manifest.name if index else None, results)


def default_device() -> str:
    """A GPU where torch sees one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _run_method(
    method: str, backend: Backend, index: IndexGroup | None, settings: GenerateSettings, show: Show
) -> MethodResult:
    mixing = settings.daid if method == "daid" else None
    total = len(settings.prompts) * settings.images
    with _adapter(backend, settings if method == "faid" else None) as augmenters:
        candidates = max([0, *(augmenter.k for augmenter in augmenters)])
        retriever = None
        if index is not None and method != "plain":
            retriever = Retriever(index, candidates or settings.k)
        tracer = Tracer(total, mixing, candidates) if settings.traced and retriever else None
        began = time.monotonic()
        generated = generate(
            backend,
            settings.prompts,
            images=settings.images,
            seed=settings.seed,
            retriever=retriever,
            daid=mixing,
            augmenters=augmenters,
            guidance=settings.guidance,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            progress=lambda done, all_: show(f"drawing, {LABELS[method]}", done, all_),
            watch=tracer,
        )
        seconds = time.monotonic() - began
    pictures = []
    for number, grid in enumerate(generated.tokens):
        show("decoding pictures", number, total)
        pictures.append(backend.pixels(grid[None])[0])
    return MethodResult(method, generated, np.stack(pictures), seconds, tracer)


@contextmanager
def _adapter(backend: Backend, settings: GenerateSettings | None) -> Iterator[Sequence[Augmenter]]:
    """The adapter that is named, attached to the model for as long as it is used; or none."""
    if settings is None or settings.adapter is None:
        yield ()
        return
    from arrag_runtime.faid.attach import attach_faid

    attached = attach_faid(backend.model, settings.adapter)
    try:
        yield (attached,)
    finally:
        attached.detach()
