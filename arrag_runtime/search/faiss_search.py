"""Searching an index that faiss holds whole: `flat` and `ivfpq`. Entries stand as they were added.

Where faiss-gpu is installed and sees a GPU, an ivfpq index is searched there, but for what its
kernels cannot do. (Written after faiss' documentation; it has not run on a GPU yet.)
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.inverted_lists import ListPart
from arrag_runtime.format.manifest import IDS_FILE, INDEX_FILE, TOKENS_FILE
from arrag_runtime.format.specs import Floats
from arrag_runtime.search.codebook_search import require_faiss

_GPU_LIMIT = 2048
"""faiss' GPU kernels take no larger k or nprobe."""
log = logging.getLogger(__name__)


class FaissSearch:
    """A faiss index; one engine behind `PatchIndex`."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._ivf = inner_ivf(index)
        self.entries = int(index.ntotal)
        self.lists = None if self._ivf is None else int(self._ivf.nlist)
        self._on_gpu = None
        if self._ivf is not None and has_gpu():
            # The resources must live as long as the clone.
            self._resources = require_faiss().StandardGpuResources()
            self._on_gpu = _clone_to_gpu(self._resources, index)
        self._announced = False

    @staticmethod
    def open(folder: Path) -> "FaissSearch":
        """Read the index in this folder. Raises IncompatibleError where it is damaged."""
        try:
            return FaissSearch(require_faiss().read_index(str(folder / INDEX_FILE)))
        except RuntimeError as error:
            raise IncompatibleError(f"index {folder} is damaged; index again") from error

    @property
    def nprobe(self) -> int | None:
        return None if self._ivf is None else int(self._ivf.nprobe)

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        if self._ivf is None:
            raise BadInputError("this index has no lists, so no nprobe to set")
        if not 1 <= value <= self._ivf.nlist:
            raise BadInputError(f"nprobe {value} is outside 1..{self.lists} lists")
        self._ivf.nprobe = value
        if self._on_gpu is not None and value <= _GPU_LIMIT:
            require_faiss().GpuParameterSpace().set_index_parameter(self._on_gpu, "nprobe", value)

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Ids]:
        """See `CodebookSearch.search`."""
        index = self._index
        if self._on_gpu is not None:
            if max(k, self.nprobe or 0) <= _GPU_LIMIT:
                index = self._on_gpu
            elif not self._announced:
                self._announced = True
                log.warning(
                    "k %d or nprobe %s is more than the GPU's %d, so the CPU searches",
                    k,
                    self.nprobe,
                    _GPU_LIMIT,
                )
        distances, places = index.search(vectors, k)
        distances[places < 0] = np.inf
        return distances, places


def has_gpu() -> bool:
    """Whether the faiss installed here can use a GPU and sees one."""
    faiss = require_faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _clone_to_gpu(resources: Any, index: Any) -> Any:
    """The index on the first GPU, or None, announced, where its layout is not for a GPU."""
    faiss = require_faiss()
    options = faiss.GpuClonerOptions()
    # Whole look-up tables of 32 bits do not fit a GPU's shared memory at every layout.
    options.useFloat16LookupTables = True
    try:
        return faiss.index_cpu_to_gpu(resources, 0, index, options)
    except RuntimeError as error:
        log.warning("the CPU searches, since the GPU cannot: %s", str(error).splitlines()[0])
        return None


def inner_ivf(index: Any) -> Any:
    """The IVF inside an index and its pre-transforms, where nprobe takes effect; or None."""
    try:
        return require_faiss().extract_index_ivf(index)
    except RuntimeError:
        return None


def open_entries(folder: Path) -> ListPart:
    """The next tokens and patch ids of such an index, as one list whose codes faiss holds.

    Raises IncompatibleError where they are damaged.
    """
    try:
        tokens, ids = (
            np.asarray(np.load(folder / name, mmap_mode="r")) for name in (TOKENS_FILE, IDS_FILE)
        )
    except (OSError, ValueError, EOFError) as error:
        raise IncompatibleError(f"index {folder} is damaged or incomplete; index again") from error
    if len(tokens) != len(ids):
        raise IncompatibleError(
            f"index {folder} is damaged: {len(ids)} patch ids for {len(tokens)} next tokens; index"
            " again"
        )
    none, codes = np.empty(0, np.int64), np.empty((len(ids), 0), np.uint8)
    starts = np.array([0, len(ids)])
    return ListPart(folder, starts, codes, tokens, ids, none, np.zeros(1, np.int64), none)
