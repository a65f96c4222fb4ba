"""Whether a database fits a generator, asked before anything is generated.

A key is made of the tokens that stand around a position, so tokens must mean the same on both
sides (vocabulary, dimension, and the codebook row by row), grids must have the same shape, and the
neighbours must exist already when a position is predicted.
"""

from pathlib import Path

from arrag_runtime.backends import Backend
from arrag_runtime.format.errors import IncompatibleError
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook
from arrag_runtime.format.neighborhood import Neighborhood
from arrag_runtime.format.specs import SAME_CODE_COSINE, Floats, TokenizerSpec


def require_fit(
    database: str | Path, backend: Backend, neighborhood: Neighborhood | None = None
) -> DatabaseManifest:
    """The manifest of a database that fits a generator.

    neighborhood: that of the index to be searched; by default the database's own.
    Raises IncompatibleError that names both and the first thing that differs.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    what, around = f"database {database}", neighborhood or manifest.keys.neighborhood
    require_same_grids(what, manifest.tokenizer, read_codebook(layout), around, backend)
    return manifest


def require_same_grids(
    what: str, spec: TokenizerSpec, codebook: Floats, around: Neighborhood, backend: Backend
) -> None:
    """Raise IncompatibleError unless grids of this tokenizer and keys are what a generator draws.

    what: the thing that holds them, for the message; codebook: its, float32 [V, d], normalised.
    """
    codes = backend.codebook()
    height, width = backend.grid
    both = f"{what} ({spec.describe()}) does not fit generator {backend.name}"
    advice = "build one with the generator's own tokenizer (arrag-db build --tokenizer …)"
    if (spec.vocabulary, spec.dimension) != codes.shape:
        raise IncompatibleError(
            f"{both}, whose codebook has {codes.shape[0]} codes x {codes.shape[1]}; {advice}"
        )
    if (spec.grid_height, spec.grid_width) != (height, width):
        raise IncompatibleError(f"{both}, whose grid is {height}x{width}; {advice}")
    lowest = float((codebook * codes).sum(axis=1).min())
    if not lowest >= SAME_CODE_COSINE:
        raise IncompatibleError(
            f"{both}: their codebooks differ (lowest cosine of a row {lowest:.4f}, needed"
            f" {SAME_CODE_COSINE}); {advice}"
        )
    if not around.is_causal:
        raise IncompatibleError(
            f"{both}, which draws in reading order: keys of {around.name} need tokens that come"
            " later; build with --neighborhood causal-1"
        )
