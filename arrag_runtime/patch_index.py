"""An index on disk, opened and searched.

In: search vectors or keys, one a row. Out: `Neighbors`: for each query its nearest entries, nearest
first, with their next tokens, squared L2 distances and patch ids. A folder of an index holds
`index.faiss`, `patch_ids.npy` and `next_tokens.npy` (memory-mapped, in the order entries were
added) and `manifest.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import ArragError, BadInputError, IncompatibleError
from schemas.location import exists, join, local_folder, modified, names
from schemas.manifest import (
    IDS_FILE,
    INDEX_FILE,
    TOKENS_FILE,
    IndexManifest,
    Layout,
    read_codebook,
)
from schemas.specs import Floats, key_vectors
from schemas.tables import Ids, split_patch_ids


@dataclass(frozen=True)
class Neighbors:
    """The nearest entries of N queries, nearest first.

    tokens: uint16 [N, K] next tokens; distances: float32 [N, K] squared L2; patch_ids: int64 [N, K];
    count: int64 [N]: how many of the K are real. Beyond `count` tokens are 0, distances infinite
    and patch ids -1; no reader may use them.
    """

    tokens: npt.NDArray[np.uint16]
    distances: npt.NDArray[np.float32]
    patch_ids: Ids
    count: npt.NDArray[np.int64]


def require_faiss() -> Any:
    """The faiss module. Raises ArragError with the next step where none is installed."""
    try:
        import faiss
    except ImportError as error:
        raise ArragError(
            "searching needs faiss, which is not installed; `pip install 'arrag[cpu]'` (or"
            " 'arrag[gpu]' on a machine with CUDA)"
        ) from error
    return faiss


class PatchIndex:
    """An opened index; `PatchIndex.open` finds and checks it."""

    def __init__(
        self, manifest: IndexManifest, index: Any, ids: Ids, tokens: Any, codes: Floats
    ) -> None:
        self.manifest = manifest
        self._index, self._ids, self._tokens, self._codes = index, ids, tokens, codes
        if index.ntotal != len(ids) or len(ids) != len(tokens) or len(ids) != manifest.count:
            raise IncompatibleError(
                f"index {manifest.name} is damaged: {index.ntotal} vectors, {len(ids)} ids and"
                f" {len(tokens)} next tokens, {manifest.count} in its manifest; index again"
            )
        if manifest.nprobe is not None:
            self.nprobe = manifest.nprobe

    @staticmethod
    def open(database: Path | str, name: str | None = None) -> "PatchIndex":
        """Open an index of a database: the one of this name, or its only or newest one.

        Raises BadInputError where there is none.
        """
        faiss = require_faiss()
        layout = Layout(database)
        folder = layout.index(name) if name else newest_index(layout)
        manifest = IndexManifest.read(folder)
        try:
            local = local_folder(folder)
            index = faiss.read_index(str(local / INDEX_FILE))
            ids = np.load(local / IDS_FILE, mmap_mode="r")
            tokens = np.load(local / TOKENS_FILE, mmap_mode="r")
        except (RuntimeError, OSError, ValueError) as error:
            raise IncompatibleError(
                f"index {manifest.name} in {folder} is damaged or incomplete; index again"
            ) from error
        return PatchIndex(manifest, index, ids, tokens, read_codebook(layout))

    @property
    def nprobe(self) -> int | None:
        """The number of lists a search visits, read back from the inner IVF; None without one."""
        ivf = inner_ivf(self._index)
        return None if ivf is None else int(ivf.nprobe)

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        ivf = inner_ivf(self._index)
        if ivf is None:
            raise BadInputError(f"index {self.manifest.name} has no lists, so no nprobe to set")
        if not 1 <= value <= ivf.nlist:
            raise BadInputError(f"nprobe {value} is outside 1..{ivf.nlist}")
        ivf.nprobe = value

    @property
    def count(self) -> int:
        """The number of entries."""
        return self.manifest.count

    def entries(self, start: int, count: int) -> tuple[Ids, npt.NDArray[np.uint16]]:
        """The (patch ids, next tokens) of entries in the order they were added."""
        return self._ids[start : start + count], self._tokens[start : start + count]

    def vectors(self, keys: npt.NDArray[Any]) -> Floats:
        """Search vectors float32 [N, n · d] of token keys uint16 [N, n].

        Raises BadInputError for a key of another length or a token outside the codebook.
        """
        size = self.manifest.keys.neighborhood.size
        if keys.ndim != 2 or keys.shape[1] != size:
            raise BadInputError(
                f"a key of {self.manifest.keys.name} has {size} tokens, not {keys.shape[-1]}"
            )
        return key_vectors(keys, self._codes)

    def search(self, keys: npt.NDArray[Any], k: int, *, exclude: Ids | None = None) -> Neighbors:
        """The k nearest entries of token keys uint16 [N, n].

        exclude: int64 [N] or [N, M], for each query the pictures whose entries must not be returned
        (-1 for none); as many more entries are fetched as they can have, and theirs dropped.
        """
        return self.search_vectors(self.vectors(keys), k, exclude=exclude)

    def search_vectors(self, vectors: Floats, k: int, *, exclude: Ids | None = None) -> Neighbors:
        """`search` for search vectors float32 [N, n · d]."""
        if k < 1:
            raise BadInputError(f"k is {k}; ask for at least 1 neighbour")
        spare = 0
        if exclude is not None:
            exclude = exclude.reshape(len(vectors), -1)
            spare = exclude.shape[1] * int(self.manifest.settings["patches_per_image"])
        fetched = min(k + spare, max(self.count, 1))
        distances, rows = self._index.search(np.ascontiguousarray(vectors, np.float32), fetched)
        real = rows >= 0
        ids = np.where(real, self._ids[np.maximum(rows, 0)], -1) if self.count else rows
        if exclude is not None:
            images = split_patch_ids(ids)[0]
            for column in exclude.T:
                real &= images != column[:, None]
        order = np.argsort(~real, axis=1, kind="stable")[:, :k]
        return self._gather(rows, distances, ids, real, order, k)

    def _gather(
        self, rows: Ids, distances: Floats, ids: Ids, real: Any, order: Any, k: int
    ) -> Neighbors:
        """The first k real results of each row, padded to k."""
        pad = ((0, 0), (0, k - order.shape[1]))
        real, rows, distances, ids = (
            np.take_along_axis(array, order, axis=1) for array in (real, rows, distances, ids)
        )
        tokens = np.zeros(rows.shape, np.uint16)
        tokens[real] = self._tokens[rows[real]]
        return Neighbors(
            np.pad(tokens, pad),
            np.pad(
                np.where(real, distances, np.inf).astype(np.float32), pad, constant_values=np.inf
            ),
            np.pad(np.where(real, ids, -1), pad, constant_values=-1),
            real.sum(axis=1),
        )


def inner_ivf(index: Any) -> Any:
    """The IVF inside an index and its pre-transforms, where nprobe takes effect; or None."""
    faiss = require_faiss()
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:
        return None


def newest_index(layout: Layout) -> str:
    """The folder of the index built last. Raises BadInputError where there is none."""
    folders = index_folders(layout)
    if not folders:
        raise BadInputError(
            f"database {layout.root} has no index; build one with `arrag-db index"
            f" --db {layout.root}`"
        )
    return max(folders, key=lambda folder: modified(join(folder, "manifest.json")))


def index_folders(layout: Layout) -> Sequence[str]:
    """The folders of complete indexes, by name."""
    folders = (layout.index(name) for name in names(layout.indexes) if name[0] != ".")
    return [folder for folder in folders if exists(join(folder, "manifest.json"))]
