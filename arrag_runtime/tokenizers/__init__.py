"""Tokenizers: pictures to token grids and back.

A tokenizer is named in `TOKENIZERS` and follows the protocol `Tokenizer`; torch is imported only
when one is made. Read `vq16` first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.specs import Floats, TokenizerSpec

Pixels = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Encoded:
    """What a tokenizer makes of a batch of pictures."""

    tokens: Tokens
    """uint16 [B, h, w]."""
    latents: npt.NDArray[np.float16] | None
    """float16 [B, h, w, d], L2-normalised; None unless asked for."""


class Tokenizer(Protocol):
    """What the encode step and the queries need of a tokenizer."""

    spec: TokenizerSpec
    """What makes its tokens mean the same elsewhere."""
    weights: str | None
    """What loads the same weights again: a path, or a hub id with its commit; None: its own."""
    precision: str
    """Of the network, "float32" or "bfloat16"."""

    def setup(self, device: str, *, precision: str | None = None, compile: bool = False) -> None:
        """Place the model on "cpu" or "cuda[:n]"; the precision defaults to the device's own."""

    def encode(self, images: Pixels, *, latents: bool = False) -> Encoded:
        """Token grids of prepared pictures uint8 [B, size, size, 3]."""

    def agreement(self, images: Pixels) -> float:
        """The share (0..1) of token ids that equal those of float32 on these pictures."""

    def decode(self, tokens: Tokens) -> Pixels:
        """Pictures uint8 [B, size, size, 3] from token grids uint16 [B, h, w]."""

    def codebook(self) -> Floats:
        """The L2-normalised codebook float32 [V, d] that token ids index."""


def _sample(weights: str | None) -> Tokenizer:
    from arrag_runtime.tokenizers.sample import load_sample

    return load_sample(weights)


def _vq16(weights: str | None) -> Tokenizer:
    from arrag_runtime.tokenizers.vq16 import load_vq16

    return load_vq16(weights)


TOKENIZERS: dict[str, Callable[[str | None], Tokenizer]] = {"sample": _sample, "vq16": _vq16}


def load_tokenizer(name: str, weights: str | None = None) -> Tokenizer:
    """The tokenizer of this name, not yet set up on a device.

    weights: a file, folder or hub id for it; None takes the tokenizer's own default.
    Raises BadInputError for an unknown name or weights that do not fit.
    """
    if name not in TOKENIZERS:
        raise BadInputError(f"unknown tokenizer '{name}'; choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name](weights)
