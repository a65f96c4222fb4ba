"""Tokens so far and a position in, neighbours out: retrieval as a decode loop needs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from arrag_runtime.format.ids import Ids
from arrag_runtime.search.index_group import IndexGroup
from arrag_runtime.search.neighbors import Neighbors
from arrag_runtime.search.patch_index import PatchIndex


class Retriever:
    """Answers "what came next in real pictures" for positions of grids that are being filled."""

    def __init__(
        self, index: PatchIndex | IndexGroup, k: int, *, keep: Sequence[Ids | None] | None = None
    ) -> None:
        """keep: for each database the ids of the pictures to search in, ascending; None for all."""
        self.index = index if isinstance(index, IndexGroup) else IndexGroup([index])
        self.k = k
        self._keep = keep

    @staticmethod
    def open(
        *databases: Path | str,
        k: int = 2048,
        index: str | None = None,
        weights: Sequence[float] | None = None,
    ) -> "Retriever":
        """A retriever over the indexes of one or several databases, searched as one.

        K = 2,048 is DAiD's (AR-RAG, section 3.2). index: by default each database's newest;
        weights: what a database's entries count for, 1 each by default.
        """
        opened = [PatchIndex.open(database, index) for database in databases]
        return Retriever(IndexGroup(opened, weights), k)

    def at(
        self, grids: npt.NDArray[Any], row: int, col: int, *, exclude: Ids | None = None
    ) -> Neighbors | None:
        """The neighbours for (row, col) of grids uint16 [B, h, w], one query per grid.

        With a causal neighbourhood only tokens before the position are read. exclude: see
        `PatchIndex.search`. None where the position has no full neighbourhood (`border = skip`).
        """
        keys = self.index.manifest.keys.neighborhood.key_at(grids, row, col)
        if keys is None:
            return None
        return self.index.search(keys, self.k, exclude=exclude, keep=self._keep)
