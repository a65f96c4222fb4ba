"""Tokens so far and a position in, neighbours out: retrieval as a decode loop needs it."""

from pathlib import Path
from typing import Any

import numpy.typing as npt

from arrag_runtime.neighbors import Neighbors
from arrag_runtime.patch_index import PatchIndex


class Retriever:
    """Answers "what came next in real pictures" for positions of grids that are being filled."""

    def __init__(self, index: PatchIndex, k: int) -> None:
        self.index = index
        self.k = k

    @staticmethod
    def open(database: Path | str, *, k: int = 2048, index: str | None = None) -> "Retriever":
        """A retriever over a database's index. K = 2,048 is DAiD's (AR-RAG, section 3.2)."""
        return Retriever(PatchIndex.open(database, index), k)

    def at(self, grids: npt.NDArray[Any], row: int, col: int) -> Neighbors | None:
        """The neighbours for (row, col) of grids uint16 [B, h, w], one query a grid.

        With a causal neighbourhood only tokens before the position are read. None where the
        position has no full neighbourhood (`border = skip`).
        """
        keys = self.index.manifest.keys.neighborhood.key_at(grids, row, col)
        return None if keys is None else self.index.search(keys, self.k)
