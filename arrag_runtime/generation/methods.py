"""What `arrag generate` does: load a generator, check that the database fits it, generate, account.

In: `GenerateSettings`. Out: a `GenerateReport` with the pictures of each method, and on request
their trace. Everything that can be wrong is found before the first token is drawn.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.backends import Backend, load_backend
from arrag_runtime.backends.compatibility import require_fit
from arrag_runtime.device import default_device
from arrag_runtime.faid.augmenter import Augmenter
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.images import ImageRow, ImageTable
from arrag_runtime.format.manifest import Layout
from arrag_runtime.generation.copied_runs import longest_copy
from arrag_runtime.generation.generate import Generated, generate
from arrag_runtime.generation.picture_grid import comparison, grid_picture, save_png
from arrag_runtime.generation.settings import GenerateSettings
from arrag_runtime.generation.trace import SourceImage, TokenTrace, Traced, Tracer, trace_json
from arrag_runtime.generation.trace_sheet import draw_trace, heaviest_sources
from arrag_runtime.progress import Progress, silent
from arrag_runtime.search.index_group import IndexGroup
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.search.retriever import Retriever
from arrag_runtime.tokenizers import Pixels

_LABELS = {"plain": "plain", "daid": "DAiD", "faid": "FAiD"}
_MOST_TRACED_ROWS = 8


@dataclass(frozen=True)
class MethodResult:
    """The pictures of one method, "plain", "daid" or "faid", and the seconds of decoding tokens."""

    method: str
    generated: Generated
    pixels: Pixels
    """uint8 [N, H, W, 3]."""
    seconds: float
    traces: Sequence[Sequence[TokenTrace]]
    """For each picture its tokens' traces; none where nothing was asked for or retrieved."""

    @property
    def tokens_per_second(self) -> float:
        """The speed of decoding."""
        return self.generated.tokens.size / self.seconds

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        made = self.generated
        return {
            "method": self.method,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "images": [
                {"prompt": prompt, "seed": seed, "tokens": grid.tolist()}
                for prompt, seed, grid in zip(made.prompts, made.seeds, made.tokens, strict=True)
            ],
        }


@dataclass(frozen=True)
class GenerateReport:
    """What came out of generating with each method."""

    settings: GenerateSettings
    backend: Backend
    """The generator, kept to draw sources for the trace."""
    index: str | None
    """The name of the index that was searched; None where nothing was."""
    results: tuple[MethodResult, ...]

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
            "methods": [result.to_json() for result in self.results],
        }

    def to_text(self) -> str:
        """A line per method."""
        return "\n".join(
            f"{_LABELS[result.method]}: {len(result.pixels)} pictures, {result.seconds:.1f} s,"
            f" {result.tokens_per_second:.0f} tokens/s"
            for result in self.results
        )

    def traced(self) -> "TraceReport":
        """The trace of a method, DAiD's where several retrieve, and its sources looked up."""
        result = next((result for result in self.results if result.traces), None)
        if result is None:
            raise BadInputError("nothing was traced; retrieve something, with --mode daid")
        entries = (e for trace in result.traces for token in trace for e in token.entries)
        sources = sorted({entry.source for entry in entries})
        origins: dict[SourceImage, ImageRow] = {}
        grids: dict[SourceImage, npt.NDArray[np.uint16]] = {}
        for number, database in enumerate(self.settings.databases):
            table = ImageTable(Layout(database).images)
            ids = [image for origin, image in sources if origin == number]
            origins |= {(number, image): row for image, row in table.rows(ids).items()}
            held = table.grids(ids, self.backend.grid[0])
            grids |= {(number, image): grid for image, grid in held.items()}
        made = result.generated
        copies = [longest_copy(grid, grids) for grid in made.tokens]
        parts = zip(made.prompts, made.seeds, result.pixels, result.traces, copies, strict=True)
        pictures = [Traced(*part) for part in parts]
        return TraceReport(self, result.method, pictures, origins, grids)


@dataclass(frozen=True)
class TraceReport:
    """The traced pictures of a method, and the rows and token grids [h, w] of their sources."""

    report: GenerateReport
    method: str
    pictures: Sequence[Traced]
    origins: Mapping[SourceImage, ImageRow]
    grids: Mapping[SourceImage, npt.NDArray[np.uint16]]

    def to_json(self) -> dict[str, Any]:
        """What `--trace` writes."""
        settings = self.report.settings
        about: dict[str, Any] = {
            "method": self.method,
            "model": settings.model,
            "databases": [str(database) for database in settings.databases],
            "index": self.report.index,
        }
        if self.method == "daid":
            mixing = settings.daid
            about |= {"k": settings.k, "lambda": mixing.lam, "tau": mixing.tau}
            about |= {"merge": mixing.merge, "entropy_above": mixing.entropy_above}
        return trace_json(self.pictures, self.report.backend.grid[1], self.origins, about)

    def draw(self, path: Path) -> None:
        """What `--trace-sheet` draws: the first eight pictures and their heaviest sources."""
        backend, rows = self.report.backend, self.pictures[:_MOST_TRACED_ROWS]
        wanted = {source for row in rows for source in heaviest_sources(row.trace)}
        shown = {
            source: backend.pixels(self.grids[source][None])[0]
            for source in sorted(wanted & self.grids.keys())
        }
        method, model = _LABELS[self.method], self.report.settings.model
        title = f"Where the tokens came from: {method}, {model}"
        save_png(draw_trace(rows, backend.grid, shown, self.origins, title), path)


def run(settings: GenerateSettings, show: Progress = silent) -> GenerateReport:
    """Generate. show: called with (what is being done, done, in all).

    Raises BadInputError or IncompatibleError, with everything named, before the first token.
    """
    index = None
    if settings.mode != "plain":
        index = IndexGroup([PatchIndex.open(one, settings.index) for one in settings.databases])
    device = settings.device or default_device()
    backend = load_backend("janus", settings.model, device=device, precision=settings.precision)
    if index is not None:
        for database in settings.databases:
            require_fit(database, backend, index.manifest.keys.neighborhood)
    with _adapter(backend, settings.adapter):
        pass  # one that does not fit is refused before anything is generated
    results = [_run_method(method, backend, index, settings, show) for method in settings.methods]
    return GenerateReport(settings, backend, index.manifest.name if index else None, tuple(results))


def _run_method(
    name: str,
    backend: Backend,
    index: IndexGroup | None,
    settings: GenerateSettings,
    show: Progress,
) -> MethodResult:
    mixing = settings.daid if name == "daid" else None
    total = len(settings.prompts) * settings.images
    with _adapter(backend, settings.adapter if name == "faid" else None) as augmenters:
        candidates = max((augmenter.k for augmenter in augmenters), default=0)
        retriever = None
        if index is not None and name != "plain":
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
            progress=lambda done, all_: show(f"drawing, {_LABELS[name]}", done, all_),
            watch=tracer,
        )
        seconds = time.monotonic() - began
    pictures = []
    for number, grid in enumerate(generated.tokens):
        show("decoding pictures", number, total)
        pictures.append(backend.pixels(grid[None]))
    traces = tracer.traces if tracer else ()
    return MethodResult(name, generated, np.concatenate(pictures), seconds, traces)


@contextmanager
def _adapter(backend: Backend, adapter: Path | None) -> Iterator[Sequence[Augmenter]]:
    """The adapter that is named, attached to the model for as long as it is used; or none."""
    if adapter is None:
        yield ()
        return
    from arrag_runtime.faid.attach import attach_faid

    attached = attach_faid(backend.model, adapter)
    try:
        yield (attached,)
    finally:
        attached.detach()
