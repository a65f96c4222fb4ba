"""A search over a small world with faiss alone, as certificates and evaluations see one."""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from arrag_runtime.format.ids import Ids, split_patch_ids
from arrag_runtime.format.specs import key_vectors
from arrag_runtime.search.neighbors import Neighbors
from tests.worlds.patch_world import CODES, World


class PlainSearch:
    """A faiss index of this factory string over all entries of a world."""

    def __init__(self, world: World, key: str) -> None:
        self.world = world
        self.index: Any = faiss.index_factory(world.vectors.shape[1], key)
        self.index.train(world.vectors)
        self.index.add(world.vectors)
        self.asked: list[Any] = []

    @property
    def lists(self) -> int | None:
        return getattr(self.index, "nlist", None)

    @property
    def nprobe(self) -> Any:
        return getattr(self.index, "nprobe", None)

    @nprobe.setter
    def nprobe(self, value: Any) -> None:
        self.index.nprobe = value

    def search(self, keys: npt.NDArray[Any], k: int, *, exclude: Ids | None = None) -> Neighbors:
        """Everything is fetched, then what is excluded is dropped, a query at a time."""
        self.asked.append(exclude)
        distances, rows = self.index.search(key_vectors(keys, CODES), len(self.world.ids))
        ids = np.where(rows >= 0, self.world.ids[rows], -1)
        found = Neighbors.of(
            np.zeros((len(keys), k), np.uint16),
            np.full((len(keys), k), np.inf, np.float32),
            np.full((len(keys), k), -1),
            np.zeros(len(keys), np.int64),
        )
        for query in range(len(keys)):
            real = rows[query] >= 0
            if exclude is not None:
                real &= ~np.isin(split_patch_ids(ids[query])[0], exclude[query])
            at = np.flatnonzero(real)[:k]
            found.count[query] = count = len(at)
            found.copies[query, :count] = found.weights[query, :count] = 1
            found.tokens[query, :count] = self.world.tokens[rows[query, at]]
            found.distances[query, :count] = distances[query, at]
            found.patch_ids[query, :count] = ids[query, at]
        return found
