"""Grids to patches: every position with a key becomes (patch id, key, next token).

In: token grids uint16 [B, h, w] and the pictures' ids; latents [B, h, w, d] in latent key space.
Out: an Arrow table of the schema `patches_schema`.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids, patch_ids
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.specs import KeySpec, TokenizerSpec
from arrag_runtime.tokenizers import Tokens
from schemas.tables import patches_schema


def extract_patches(
    spec: TokenizerSpec,
    keys: KeySpec,
    image_ids: Ids,
    tokens: Tokens,
    latents: npt.NDArray[np.float16] | None = None,
) -> pa.Table:
    """The patches of these grids in the order of their ids within each picture.

    image_ids: int64 [B]; tokens: uint16 [B, h, w]; latents: float16 [B, h, w, d].
    """
    grids: npt.NDArray[Any] | None = tokens if keys.space == "codebook" else latents
    if grids is None:
        raise BadInputError("latent keys need the latents, which this database does not keep")
    positions = keys.neighborhood.positions(spec.grid_height, spec.grid_width)
    # Keys uint16 [B, P, n], or float16 [B, P, n, d] in latent space; a row for each below.
    gathered = keys.neighborhood.keys(grids)
    rows = gathered.reshape(-1, math.prod(gathered.shape[2:]))
    next_tokens = tokens.reshape(len(tokens), spec.positions)[:, positions]
    return pa.table(
        [
            pa.array(patch_ids(image_ids, positions).reshape(-1)),
            fixed_lists(rows),
            pa.array(np.ascontiguousarray(next_tokens).reshape(-1)),
        ],
        schema=patches_schema(spec, keys),
    )
