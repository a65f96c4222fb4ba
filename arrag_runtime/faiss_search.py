"""Searching an index that faiss holds whole: `flat` and `ivfpq`. Entries stand as they were added."""

from pathlib import Path
from typing import Any

import numpy as np

from arrag_runtime.codebook_search import require_faiss
from arrag_runtime.neighbors import EntryPart
from schemas.errors import BadInputError, IncompatibleError
from schemas.manifest import IDS_FILE, INDEX_FILE, TOKENS_FILE
from schemas.specs import Floats
from schemas.tables import Ids


class FaissSearch:
    """A faiss index; one engine behind `PatchIndex`."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._ivf = inner_ivf(index)

    @staticmethod
    def open(folder: Path) -> "FaissSearch":
        """Read the index in this folder. Raises IncompatibleError where it is damaged."""
        try:
            return FaissSearch(require_faiss().read_index(str(folder / INDEX_FILE)))
        except RuntimeError as error:
            raise IncompatibleError(f"index {folder} is damaged; index again") from error

    @property
    def entries(self) -> int:
        """The number of entries."""
        return int(self._index.ntotal)

    @property
    def lists(self) -> int | None:
        """The number of lists, None without lists."""
        return None if self._ivf is None else int(self._ivf.nlist)

    @property
    def nprobe(self) -> int | None:
        """The lists a search visits, read back from the IVF inside; None without lists."""
        return None if self._ivf is None else int(self._ivf.nprobe)

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        if self._ivf is None:
            raise BadInputError("this index has no lists, so no nprobe to set")
        if not 1 <= value <= self._ivf.nlist:
            raise BadInputError(f"nprobe {value} is outside 1..{self._ivf.nlist} lists")
        self._ivf.nprobe = value

    def search(self, vectors: Floats, k: int) -> tuple[Floats, Ids]:
        """See `SearchEngine.search`."""
        distances, places = self._index.search(vectors, k)
        distances[places < 0] = np.inf
        return distances, places


def inner_ivf(index: Any) -> Any:
    """The IVF inside an index and its pre-transforms, where nprobe takes effect; or None."""
    try:
        return require_faiss().extract_index_ivf(index)
    except RuntimeError:
        return None


def open_entries(folder: Path) -> EntryPart:
    """The next tokens and patch ids of such an index, mapped. Raises IncompatibleError if damaged."""
    none = np.empty(0, np.int64)
    try:
        return EntryPart(
            np.asarray(np.load(folder / TOKENS_FILE, mmap_mode="r")),
            np.asarray(np.load(folder / IDS_FILE, mmap_mode="r")),
            *(none, np.zeros(1, np.int64), none),
        )
    except (OSError, ValueError, EOFError) as error:
        raise IncompatibleError(f"index {folder} is damaged or incomplete; index again") from error
