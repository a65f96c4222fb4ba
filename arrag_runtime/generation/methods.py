"""What `arrag generate` does: load a generator, check that the database fits it, generate, account.

In: `GenerateSettings`. Out: a `GenerateReport` with the pictures of each method, and on request
their trace.
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

from arrag_runtime.backends import Backend, load_backend
from arrag_runtime.backends.compatibility import require_fit
from arrag_runtime.device import default_device
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.generation.augmenter import Augmenter
from arrag_runtime.generation.copied_runs import CopyRun, longest_copy
from arrag_runtime.generation.generate import Generated, generate
from arrag_runtime.generation.picture_grid import comparison, grid_picture, save_png
from arrag_runtime.generation.settings import GenerateSettings
from arrag_runtime.generation.trace import Origin, SourceImage, Tracer, source_weights, trace_json
from arrag_runtime.generation.trace_sheet import Traced, draw_trace, heaviest_sources
from arrag_runtime.search.index_group import IndexGroup
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.search.retriever import Retriever
from arrag_runtime.tokenizers import Pixels

_LABELS = {"plain": "plain", "daid": "DAiD", "faid": "FAiD"}
_MOST_TRACED_ROWS = 8
_Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MethodResult:
    """The pictures of one method."""

    method: str
    """Its name: "plain", "daid" or "faid"."""
    generated: Generated
    """The token grids."""
    pixels: Pixels
    """The pictures, uint8 [N, H, W, 3]."""
    seconds: float
    """What decoding the tokens took."""
    tracer: Tracer | None
    """What was traced; None where nothing was asked for or retrieved."""


@dataclass(frozen=True)
class GenerateReport:
    """What came out of generating."""

    settings: GenerateSettings
    """What was asked for."""
    backend: Backend
    """The generator, kept to draw sources for the trace."""
    index: str | None
    """The name of the index that was searched; None where nothing was."""
    results: tuple[MethodResult, ...]
    """One per method."""

    @property
    def grid(self) -> tuple[int, int]:
        """The (rows, columns) of token grids."""
        return self.backend.grid

    def save(self, path: Path) -> None:
        """Write the picture: all pictures in a grid, or the methods side by side."""
        if len(self.results) == 1:
            save_png(grid_picture(self.results[0].pixels), path)
            return
        columns = [(_LABELS[result.method], result.pixels) for result in self.results]
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
        """A line per method."""
        return "\n".join(
            f"{_LABELS[result.method]}: {len(result.pixels)} pictures, {result.seconds:.1f} s,"
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

    def sources(self) -> list[SourceImage]:
        """All pictures behind the traced ones, in order."""
        _, tracer = self._traced
        return sorted({source for trace in tracer.traces for source in source_weights(trace)})

    def traced(
        self,
        origins: Mapping[SourceImage, Origin],
        grids: Mapping[SourceImage, npt.NDArray[np.uint16]],
    ) -> "TraceReport":
        """The trace with what the databases know of the sources: their rows and token grids."""
        result, tracer = self._traced
        copies = [longest_copy(grid, grids) for grid in result.generated.tokens]
        return TraceReport(self, result, tracer, origins, grids, copies)


@dataclass(frozen=True)
class TraceReport:
    """A trace with the origins of its sources."""

    report: GenerateReport
    """What was generated."""
    result: MethodResult
    """The method that is traced."""
    tracer: Tracer
    """Its trace."""
    origins: Mapping[SourceImage, Origin]
    """What is known of each source."""
    grids: Mapping[SourceImage, npt.NDArray[np.uint16]]
    """The token grid [h, w] of each source."""
    copies: Sequence[CopyRun | None]
    """The longest copied run of each picture."""

    def to_json(self) -> dict[str, Any]:
        """What `--trace` writes."""
        settings = self.report.settings
        about: dict[str, Any] = {
            "method": self.result.method,
            "model": settings.model,
            "databases": [str(database) for database in settings.databases],
            "index": self.report.index,
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
        traces = self.tracer.traces[:_MOST_TRACED_ROWS]
        wanted = {source for trace in traces for source in heaviest_sources(trace)}
        shown = {
            source: self.report.backend.pixels(self.grids[source][None])[0]
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
        about = f"{_LABELS[self.result.method]}, {self.report.settings.model}"
        title = f"Where the tokens came from: {about}"
        save_png(draw_trace(rows, self.report.grid, shown, self.origins, title), path)


def run(settings: GenerateSettings, show: _Show = lambda *_: None) -> GenerateReport:
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
    return GenerateReport(settings, backend, index.manifest.name if index else None, results)


def _run_method(
    method: str, backend: Backend, index: IndexGroup | None, settings: GenerateSettings, show: _Show
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
            progress=lambda done, all_: show(f"drawing, {_LABELS[method]}", done, all_),
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
