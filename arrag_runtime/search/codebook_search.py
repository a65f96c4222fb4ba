"""Searching a codebook index: faiss' IVF whose product quantiser is the tokenizer's codebook.

A key in codebook space already is a product-quantiser code: sub-quantiser o holds the codebook's
rows (scaled by the root of the offset's weight), a code holds the neighbours' tokens, and nothing
is lost. Distances are therefore exact squared L2, Σ_o w_o · ‖q_o − k_o‖². Only the coarse lists are
learned.

In: search vectors float32 [N, n · d]. Out: distances and the places of entries, counted through the
base part and then each delta part. The coarse search is done once for all parts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.inverted_lists import CENTROIDS, CODES, GRAPH, ListPart
from arrag_runtime.format.specs import Floats


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


class CodebookSearch:
    """An opened codebook index; one engine behind `PatchIndex`."""

    def __init__(self, folder: Path, layout: CodeLayout, parts: Sequence[str]) -> None:
        faiss = require_faiss()
        try:
            centroids: Floats = np.load(folder / CENTROIDS)
        except (OSError, ValueError) as error:
            raise IncompatibleError(
                f"index {folder} has no readable centroids; index again"
            ) from error
        self.parts = tuple(ListPart.open(folder / name, layout.size) for name in parts)
        if not parts:
            raise IncompatibleError(f"index {folder} names no parts; index again")
        if centroids.shape[1] != layout.dimension or any(
            len(part.starts) != len(centroids) + 1 for part in self.parts
        ):
            raise IncompatibleError(f"index {folder}: lists and centroids disagree; index again")
        self._faiss = faiss
        self._coarse = _coarse(faiss, centroids, folder / GRAPH)
        self._ivfs = [_ivf(faiss, self._coarse, layout, part) for part in self.parts]
        self._ends = np.cumsum([part.entries for part in self.parts])
        self.nprobe = 1

    @property
    def lists(self) -> int:
        """The number of lists."""
        return int(self._coarse.ntotal)

    @property
    def entries(self) -> int:
        """The number of stored entries of all parts."""
        return int(self._ends[-1])

    @property
    def nprobe(self) -> int:
        """The lists a search visits, read back from faiss' IVF."""
        return int(self._ivfs[0].nprobe)

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        if not 1 <= value <= self.lists:
            raise BadInputError(f"nprobe {value} is outside 1..{self.lists} lists")
        for ivf in self._ivfs:
            ivf.nprobe = value
        if hasattr(self._coarse, "hnsw"):
            self._coarse.hnsw.efSearch = max(64, 2 * value)

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Ids]:
        """Distances float32 [N, k], nearest first, and the places of the entries int64 [N, k].

        Where the visited lists hold fewer than k entries, places are -1 and distances infinite.
        """
        count = len(vectors)
        coarse_distances, coarse_lists = self._coarse.search(vectors, self.nprobe)
        found = [
            self._search_part(ivf, part, vectors, k, coarse_distances, coarse_lists)
            for ivf, part in zip(self._ivfs, self.parts, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        starts = self._ends - [part.entries for part in self.parts]
        distances = np.concatenate([distances for distances, _ in found], axis=1)
        places = np.concatenate(
            [
                np.where(at >= 0, at + start, -1)
                for (_, at), start in zip(found, starts, strict=True)
            ],
            axis=1,
        )
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        rows = np.arange(count)[:, None]
        return distances[rows, order], places[rows, order]

    def _search_part(
        self, ivf: Any, part: ListPart, vectors: Floats, k: int, coarse: Floats, lists: Ids
    ) -> tuple[Floats, Ids]:
        count, pointer = len(vectors), self._faiss.swig_ptr
        distances = np.empty((count, k), np.float32)
        pairs = np.empty((count, k), np.int64)
        if not part.entries:
            distances.fill(np.inf)
            pairs.fill(-1)
            return distances, pairs
        ivf.search_preassigned_c(
            count,
            pointer(vectors),
            k,
            pointer(lists),
            pointer(coarse),
            pointer(distances),
            pointer(pairs),
            True,
        )
        # A pair is the list in the upper and the place in the list in the lower half.
        places = np.where(pairs >= 0, part.starts[pairs >> 32] + (pairs & 0xFFFFFFFF), -1)
        distances[pairs < 0] = np.inf
        return distances, places


def _coarse(faiss: Any, centroids: Floats, graph: Path) -> Any:
    """The index over the centroids: exact, or the graph that was built with many of them."""
    if graph.exists():
        return faiss.read_index(str(graph))
    flat = faiss.IndexFlatL2(centroids.shape[1])
    flat.add(np.ascontiguousarray(centroids))
    return flat


def _ivf(faiss: Any, coarse: Any, layout: CodeLayout, part: ListPart) -> Any:
    """An IVF over a part that shares the coarse index."""
    neighbors = layout.keys.neighborhood.size
    ivf = faiss.IndexIVFPQ(coarse, layout.dimension, coarse.ntotal, neighbors, layout.bits)
    ivf.by_residual = False
    faiss.copy_array_to_vector(layout.centroids().reshape(-1), ivf.pq.centroids)
    ivf.is_trained = True
    if part.entries:
        lists = _mapped_lists(faiss, part)
        # The lists now belong to the IVF, which frees them.
        lists.this.disown()
        ivf.replace_invlists(lists, True)
    ivf.ntotal = part.entries
    return ivf


def _mapped_lists(faiss: Any, part: ListPart) -> Any:
    """faiss' inverted lists over a part's codes file, mapped in place.

    They have no ids: a search must ask for (list, offset) pairs, which is what `store_pairs` of
    faiss' `search_preassigned` is for. faiss reads ids nowhere else.
    """
    lists = faiss.OnDiskInvertedLists()
    size = part.codes.shape[1]
    sizes = np.diff(part.starts)
    where = np.stack([sizes, sizes, part.starts[:-1] * size], axis=1).astype(np.uint64)
    lists.nlist, lists.code_size = len(sizes), size
    lists.lists.resize(len(sizes))
    faiss.memcpy(lists.lists.data(), faiss.swig_ptr(where), where.nbytes)
    lists.filename, lists.totsize = str(part.folder / CODES), part.entries * size
    lists.read_only = True
    # Reading ahead would touch ids too.
    lists.prefetch_nthread = 0
    lists.do_mmap()
    return lists
