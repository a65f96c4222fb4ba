"""Generators: prompts and the tokens chosen so far in, logits of the next image token out.

A generator is named in `BACKENDS` and follows the protocol `Backend`; torch and transformers are
imported only when one is loaded. Read `janus` first.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.specs import Floats
from arrag_runtime.tokenizers import Pixels


class Decoding(Protocol):
    """A batch of B pictures being decoded: the model's memory of what it has read."""

    def forward(self, tokens: Any | None) -> Any:
        """Logits [rows, V] of the next position, rows being B, or 2 B with guidance.

        tokens: long [B], those of the position before; None at the first position, which follows
        the prompts. With guidance rows 0..B-1 have the prompts and rows B..2 B-1 have none.
        """


class Backend(Protocol):
    """What decoding, the trace and the check of a database need of a generator."""

    name: str
    """What the user called it."""
    model: Any
    """The torch module."""
    grid: tuple[int, int]
    """The (rows, columns) of a token grid."""
    guidance: float
    """The weight of classifier-free guidance that it is meant for."""
    temperature: float
    """The temperature of sampling that it is meant for."""

    @property
    def device(self) -> Any:
        """Where the model is."""

    def codebook(self) -> Floats:
        """The L2-normalised codebook float32 [V, d] that image tokens index."""

    def start(self, prompts: Sequence[str], *, guided: bool) -> Decoding:
        """Read the prompts, one per picture. Raises BadInputError for one that is too long."""

    def pixels(self, tokens: npt.NDArray[np.uint16]) -> Pixels:
        """Pictures uint8 [B, H, W, 3] of token grids uint16 [B, h, w]."""


def _janus(model: str, device: str, precision: str | None) -> Backend:
    from arrag_runtime.backends.janus import load_janus

    return load_janus(model, device, precision)


BACKENDS: dict[str, Callable[[str, str, str | None], Backend]] = {"janus": _janus}


def load_backend(
    name: str, model: str, *, device: str = "cpu", precision: str | None = None
) -> Backend:
    """The generator of this name with the weights that `model` names, on a device.

    model: "sample" for the bundled one, a folder, or a hub id `owner/name[@revision]`.
    precision: "float32" or "bfloat16"; by default float32 on a CPU and bfloat16 on a GPU.
    Raises BadInputError for an unknown name, weights that cannot be reached or do not fit, a device
    that is not there, or too little memory.
    """
    if name not in BACKENDS:
        raise BadInputError(f"unknown generator '{name}'; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name](model, device, precision)
