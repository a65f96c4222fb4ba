"""What the likelihood benchmark is made of: pictures, exact neighbours, likelihoods, intervals.

In: a database, a generator. Out: the negative log likelihood in nats of every token of held-out
pictures, teacher-forced: plain, mixed with what was retrieved (DAiD), or with FAiD attached.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import torch

from arrag_runtime import Neighbors, daid
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.specs import key_vectors
from arrag_runtime.search.codebook_search import require_faiss
from arrag_runtime.training.model import teacher_forced

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pictures:
    """captions: N; grids: uint16 [N, h, w]; hashes of the original files: N."""

    captions: list[str]
    grids: npt.NDArray[np.uint16]
    hashes: list[str]

    def first(self, count: int) -> "Pictures":
        """The first `count` of them."""
        return Pictures(self.captions[:count], self.grids[:count], self.hashes[:count])


def pictures_of(database: Path, split: str) -> Pictures:
    """The pictures of a split in the order of a hash, so that a longer list starts as a shorter."""
    layout = Layout(database)
    spec = DatabaseManifest.read(layout).tokenizer
    columns = ["image_id", "caption", "sha256", "tokens"]
    table = lance.dataset(layout.images).to_table(columns=columns, filter=f"split = '{split}'")
    keys = [
        hashlib.sha256(f"likelihood {i}".encode()).digest() for i in table["image_id"].to_pylist()
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    grids = list_values(table["tokens"]).reshape(-1, spec.grid_height, spec.grid_width)
    captions, hashes = table["caption"].to_pylist(), table["sha256"].to_pylist()
    return Pictures(
        [captions[n] or "a picture" for n in order], grids[order], [hashes[n] for n in order]
    )


class ExactNeighbors:
    """Exact search over the keys of some pictures, as a database of just these would answer.

    positions: those with a key; prior: how often each token occurs in the pictures, [V].
    """

    def __init__(self, database: Path, grids: npt.NDArray[np.uint16]) -> None:
        faiss = require_faiss()
        layout = Layout(database)
        self._hood = DatabaseManifest.read(layout).keys.neighborhood
        self._codes = read_codebook(layout)
        height, width = grids.shape[1:]
        self.positions = self._hood.positions(height, width).copy()
        counts = np.bincount(grids.reshape(-1), minlength=len(self._codes)) + 1.0
        self.prior: Values = counts / counts.sum()
        self._tokens = grids.reshape(len(grids), -1)[:, self.positions].reshape(-1)
        keys = self._hood.keys(grids)
        vectors = key_vectors(keys.reshape(-1, keys.shape[2]), self._codes)
        self._index: Any = faiss.IndexFlatL2(vectors.shape[1])
        self._index.add(vectors)

    def of(self, grid: npt.NDArray[np.uint16], k: int) -> Neighbors:
        """The k nearest entries of every position of a grid [h, w] that has a key, [P, K]."""
        vectors = key_vectors(self._hood.keys(grid[None])[0], self._codes)
        distances, rows = self._index.search(vectors, min(k, self._index.ntotal))
        count = np.full(len(rows), rows.shape[1], np.int64)
        return Neighbors.of(self._tokens[rows], distances, rows, count)


@torch.inference_mode()
def token_probabilities(backend: Any, caption: str, grid: npt.NDArray[np.uint16]) -> torch.Tensor:
    """The generator's distribution of every token of a picture, float32 [P, V], without guidance."""
    ids, mask = backend.prompt_ids([caption], longest=512)
    tokens = torch.from_numpy(grid.reshape(1, -1).astype(np.int64))
    device = backend.device
    logits = teacher_forced(backend, ids.to(device), mask.to(device), tokens.to(device))
    return logits[0].softmax(-1)


def true_probabilities(probabilities: torch.Tensor, grid: npt.NDArray[np.uint16]) -> Values:
    """What a distribution [P, V] says of each true token, float64 [P]."""
    true = torch.from_numpy(grid.reshape(-1, 1).astype(np.int64)).to(probabilities.device)
    found: Values = probabilities.gather(1, true)[:, 0].double().cpu().numpy()
    return found


def retrieved_probabilities(
    found: Neighbors,
    probabilities: torch.Tensor,
    grid: npt.NDArray[np.uint16],
    tau: float,
    merge: Any,
) -> Values:
    """What DAiD's retrieved distribution says of each true token, for the positions with a key.

    probabilities: the generator's own, [P with a key, V], for their number of codes only.
    """
    retrieved = daid.distribution(found, probabilities, tau, merge)
    return true_probabilities(retrieved, grid)


def faid_retrieved(found: Neighbors, positions: Any, cells: int, k: int) -> torch.Tensor:
    """Neighbours as FAiD takes them: long [1, P, K], `MISSING` where a position has no key."""
    tokens = np.full((1, cells, k), MISSING, np.int64)
    kept = min(k, found.tokens.shape[1])
    tokens[0, positions, :kept] = found.tokens[:, :kept]
    return torch.from_numpy(tokens)


def nats(probabilities: Values) -> Values:
    """Negative log likelihoods."""
    values: Values = -np.log(np.maximum(probabilities, 1e-30))
    return values


@dataclass(frozen=True)
class Mean:
    """A mean over pictures with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """With signs, as differences are read."""
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap(by_picture: Sequence[float] | Values, draws: int = 5000, seed: int = 0) -> Mean:
    """The mean of one value a picture, and the interval of its mean over redrawn pictures."""
    values = np.asarray(by_picture, np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(values.mean()), float(low), float(high))
