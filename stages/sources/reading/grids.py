"""Token grids that users already have, checked against the tokenizer they name.

In: an array or list of tokens. Out: the grid's bytes (uint16, little-endian, raster order), or why
it does not fit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from arrag_runtime.format.errors import BadInputError
from schemas.records import GridShape


@dataclass(frozen=True)
class Misfit:
    """Why tokens are no grid of this tokenizer; the reason is one of `schemas.records.REASONS`."""

    reason: str
    detail: str


def grid_bytes(values: Any, shape: GridShape | None) -> bytes | Misfit:
    """The grid in `values`: [h · w], [h, w], or several of them of which the first is taken.

    LlamaGen's files hold [1, n, h · w]: a picture and its n - 1 augmentations.
    Raises BadInputError where the shape is not known, which the build sets.
    """
    if shape is None:
        raise BadInputError("token grids are read with the tokenizer that made them; name it")
    positions = shape.height * shape.width
    try:
        tokens = np.asarray(values)
    except ValueError as error:
        return Misfit("no-grid", f"ragged lists: {error}")
    if tokens.dtype.kind == "f" and np.array_equal(tokens, np.trunc(tokens)):
        tokens = tokens.astype(np.int64)
    if tokens.dtype.kind not in "iu":
        return Misfit("no-grid", f"tokens are whole numbers, these are {tokens.dtype}")
    whole = tokens.shape[-2:] == (shape.height, shape.width)
    row = tokens.shape[-1:] == (positions,)
    if not tokens.size or not (whole or row):
        wanted = f"{shape.height}x{shape.width}"
        return Misfit("grid-size", f"an array of {list(tokens.shape)} is no grid of {wanted}")
    first = tokens.reshape(-1, positions)[0]
    outside = (first < 0) | (first >= shape.vocabulary)
    if outside.any():
        found = f"token {int(first[outside][0])} of {int(outside.sum())}"
        return Misfit("token-outside", f"{found} outside 0..{shape.vocabulary - 1}")
    packed: bytes = first.astype("<u2").tobytes()
    return packed
