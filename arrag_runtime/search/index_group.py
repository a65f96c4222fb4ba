"""Several databases searched as one, each with a weight.

In: opened indexes whose keys mean the same. Out: `Neighbors` with the nearest of all, `origin`
saying which index a result came from and `weights` what it counts for in a retrieved distribution.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.specs import SAME_CODE_COSINE
from arrag_runtime.search.neighbors import Neighbors
from arrag_runtime.search.patch_index import PatchIndex

_MOST = 256
"""`Neighbors.origin` has a byte."""


class IndexGroup:
    """Indexes of the same keys, codebook and offset weights, searched as one."""

    def __init__(
        self, indexes: Sequence[PatchIndex], weights: Sequence[float] | None = None
    ) -> None:
        """weights: one per index, not negative; all 1 by default.

        Raises IncompatibleError, naming both, for indexes that do not belong together.
        """
        self.indexes = tuple(indexes)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.indexes)
        if not 1 <= len(self.indexes) <= _MOST or len(self.weights) != len(self.indexes):
            raise BadInputError(
                f"{len(self.indexes)} databases and {len(self.weights)} weights; give 1 to {_MOST}"
                " databases and one weight for each"
            )
        if min(self.weights) < 0 or sum(self.weights) == 0:
            raise BadInputError(f"weights {self.weights} must not be negative, nor all be 0")
        for other in self.indexes[1:]:
            _require_same(self.indexes[0], other)
        self.manifest = self.indexes[0].manifest
        """Of the first index, whose keys are those of all."""
        self.count = sum(index.count for index in self.indexes)
        """The number of keys of all indexes."""

    def search(
        self,
        keys: npt.NDArray[Any],
        k: int,
        *,
        exclude: Ids | None = None,
        keep: Sequence[Ids | None] | None = None,
    ) -> Neighbors:
        """The k nearest entries of all indexes; see `PatchIndex.search`. keep: for each index."""
        kept = keep if keep is not None else [None] * len(self.indexes)
        found = []
        for number, index in enumerate(self.indexes):
            one = index.search(keys, k, exclude=exclude, keep=kept[number])
            weights = one.weights * np.float32(self.weights[number])
            origin = np.where(one.real, number, 0).astype(np.uint8)
            found.append(replace(one, weights=weights, origin=origin))
        # Of equal ones the earlier index's come first; padding has infinite distances, so last.
        distances = np.concatenate([one.distances for one in found], axis=1)
        return Neighbors.chosen(found, np.argsort(distances, axis=1, kind="stable")[:, :k])


def _require_same(one: PatchIndex, other: PatchIndex) -> None:
    first, second = one.manifest, other.manifest
    if first.keys != second.keys:
        raise IncompatibleError(
            f"index {first.name} has keys {first.keys.name} and {second.name} has"
            f" {second.keys.name}; databases that are searched as one need the same"
        )
    alike = one.codes.shape == other.codes.shape
    if not alike or (one.codes * other.codes).sum(axis=1).min() < SAME_CODE_COSINE:
        raise IncompatibleError(
            f"index {first.name} and {second.name} are of different codebooks"
            f" ({one.codes.shape} and {other.codes.shape}); search them one by one"
        )
    if first.weights != second.weights:
        raise IncompatibleError(
            f"the offsets' weights of index {first.name} ({first.weights}) and of {second.name}"
            f" ({second.weights}) differ, so their distances do not compare; index one with the"
            " other's --weights"
        )
