"""The arithmetic of ids.

patch_id, int64: 39 bits shard, 14 bits row in the shard's list, 10 bits grid position.
image_id = patch_id >> 10. Whatever is retrieved can thus be traced to its picture, row and
column without a look-up.
"""

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.specs import TokenizerSpec

SHARD_BITS, ROW_BITS, POSITION_BITS = 39, 14, 10
MAX_POSITIONS = 1 << POSITION_BITS
Ids = npt.NDArray[np.int64]
NO_IMAGE = -1
"""Fills up rows of picture ids that have fewer than others."""


def require_grid_fits(spec: TokenizerSpec) -> None:
    """Raise BadInputError for a grid whose positions do not fit a patch id."""
    if spec.positions > MAX_POSITIONS:
        raise BadInputError(
            f"the grid of {spec.name} has {spec.positions} positions; patch ids have room for"
            f" {MAX_POSITIONS} (10 bits), so use a tokenizer with a grid of at most 32x32"
        )


def shard_number(shard_id: str) -> int:
    """The 39 bits that stand for a shard (16 hex digits) in the ids of its pictures."""
    return int(shard_id, 16) >> (64 - SHARD_BITS)


def image_id(shard_id: str, row: int) -> int:
    """The id of the picture in this row of the shard's list."""
    return shard_number(shard_id) << ROW_BITS | row


def patch_ids(image_ids: Ids, positions: Ids) -> Ids:
    """Ids int64 [B, P] of the patches at these flat positions [P] of these pictures [B]."""
    return (image_ids[:, None] << POSITION_BITS) | positions[None, :]


def split_patch_ids(ids: Ids) -> tuple[Ids, Ids]:
    """The (image ids, flat positions) that patch ids are made of."""
    return ids >> POSITION_BITS, ids & (MAX_POSITIONS - 1)


def contains(ids: Ids, wanted: Ids) -> npt.NDArray[np.bool_]:
    """For each of `wanted` (any shape) whether it is among `ids`, which are sorted."""
    if not len(ids):
        return np.zeros(wanted.shape, bool)
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    found: npt.NDArray[np.bool_] = ids[at] == wanted
    return found
