"""An index on disk, opened and searched.

In: search vectors or keys, one per row. Out: `Neighbors`: for each query its nearest entries,
nearest first, with their next tokens, distances and patch ids. Padding is never returned as a
result, nor is what was removed from the database, whichever process removed it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.location import exists, join, local_folder, modified, names_in
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout, read_codebook
from arrag_runtime.format.specs import Floats, key_vectors
from arrag_runtime.search.codebook_search import CodebookSearch, require_faiss
from arrag_runtime.search.faiss_search import FaissSearch, open_entries
from arrag_runtime.search.neighbors import EntryTable, Neighbors
from arrag_runtime.search.tombstones import Tombstones

SearchEngine = CodebookSearch | FaissSearch
"""What finds entries: places counted from 0 through everything that is stored."""
_SPARE, _GROWTH = 64, 4
"""Where results may be hidden, so many more are fetched at first, then so many times as many."""


@dataclass(frozen=True)
class _Hidden:
    """The pictures that a search must not return, by ascending ids.

    exclude: int64 [N, M], those of each query, -1 for none; keep: all others than these.
    """

    exclude: Ids
    removed: Ids
    keep: Ids | None

    @property
    def nothing(self) -> bool:
        """Whether every entry may be returned."""
        return self.keep is None and not self.exclude.size and not self.removed.size

    def shows(self, query: int | slice, patch_ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of these patches [N, K] (or [K] of one query) may be returned."""
        images = split_patch_ids(patch_ids)[0]
        shown = ~contains(self.removed, images)
        for own in np.moveaxis(self.exclude[query], -1, 0):
            shown &= images != own[..., None]
        if self.keep is not None:
            shown &= contains(self.keep, images)
        return shown


class PatchIndex:
    """An opened index; `PatchIndex.open` finds and checks it."""

    def __init__(
        self,
        manifest: IndexManifest,
        engine: SearchEngine,
        entries: EntryTable,
        codes: Floats,
        tombstones: Tombstones | None = None,
    ) -> None:
        self.manifest = manifest
        self.codes = codes
        """The normalised codebook float32 [V, d] that keys are looked up in."""
        self.count = manifest.count
        """The number of keys, identical ones included."""
        self.lists = engine.lists
        """The number of lists, None without lists."""
        self._engine, self._entries, self._tombstones = engine, entries, tombstones
        if engine.entries != len(entries) or entries.keys != manifest.count:
            raise IncompatibleError(
                f"index {manifest.name} is damaged: {engine.entries} codes, {len(entries)} entries"
                f" for {entries.keys} keys, {manifest.count} in its manifest; index again"
            )
        if manifest.nprobe is not None:
            self.nprobe = manifest.nprobe

    @staticmethod
    def open(database: Path | str, name: str | None = None) -> "PatchIndex":
        """Open an index of a database: the one of this name, or its only or newest one.

        Raises BadInputError where there is none.
        """
        require_faiss()
        layout = Layout(database)
        folder = layout.index(name) if name else newest_index(layout)
        manifest = IndexManifest.read(folder)
        codes = read_codebook(layout)
        engine, entries = open_engine(manifest, local_folder(folder), codes)
        return PatchIndex(manifest, engine, entries, codes, Tombstones(layout))

    @property
    def nprobe(self) -> int | None:
        """The number of lists a search visits, read back from faiss; None without lists."""
        return self._engine.nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._engine.nprobe = value

    def search(
        self, keys: npt.NDArray[Any], k: int, *, exclude: Ids | None = None, keep: Ids | None = None
    ) -> Neighbors:
        """The k nearest entries of token keys uint16 [N, n].

        exclude: int64 [N] or [N, M], for each query the pictures whose entries must not be returned
        (-1 for none). keep: int64, ascending; only these pictures' entries are returned. As many
        more entries are fetched as it takes, so a `keep` of few pictures is slow.
        Raises BadInputError for a key of another length or a token outside the codebook.
        """
        size = self.manifest.keys.neighborhood.size
        if keys.ndim != 2 or keys.shape[1] != size:
            raise BadInputError(
                f"a key of {self.manifest.keys.name} has {size} tokens, not {keys.shape[-1]}"
            )
        vectors = key_vectors(keys, self.codes, self.manifest.weights)
        return self.search_vectors(vectors, k, exclude=exclude, keep=keep)

    def search_vectors(
        self, vectors: Floats, k: int, *, exclude: Ids | None = None, keep: Ids | None = None
    ) -> Neighbors:
        """`search` for search vectors float32 [N, n · d], already in the index's units."""
        if k < 1:
            raise BadInputError(f"k is {k}; ask for at least 1 neighbour")
        queries = len(vectors)
        none = np.empty((queries, 0), np.int64)
        removed = np.empty(0, np.int64)
        if self._tombstones is not None:
            self._tombstones.refresh()
            removed = self._tombstones.ids
        excluded = none if exclude is None else exclude.reshape(queries, -1)
        hidden = _Hidden(excluded, removed, keep)
        wide = np.ascontiguousarray(vectors, np.float32)
        fetched = k if hidden.nothing else k + _SPARE
        places, distances = np.full((queries, k), -1), np.full((queries, k), np.inf, np.float32)
        ids, copies = np.full((queries, k), -1), np.zeros((queries, k), np.int64)
        kept: list[npt.NDArray[Any]] = [places, distances, ids, copies]
        waiting = np.arange(queries)
        while len(waiting):
            fetched = min(fetched, max(self._engine.entries, 1))
            near, at = self._engine.search(wide[waiting], fetched)
            here = replace(hidden, exclude=hidden.exclude[waiting])
            patch_ids, stands_for = self._visible(at, here)
            width = min(k, fetched)
            order = np.argsort(stands_for == 0, axis=1, kind="stable")[:, :width]
            found: list[npt.NDArray[Any]] = [at, near, patch_ids, stands_for]
            for target, values in zip(kept, found, strict=True):
                target[waiting, :width] = np.take_along_axis(values, order, axis=1)
            enough = np.count_nonzero(stands_for, axis=1) >= k
            exhausted = (at[:, -1] < 0) | (fetched >= self._engine.entries)
            waiting = waiting[~(enough | exhausted)]
            fetched *= _GROWTH
        real = copies > 0
        tokens = np.zeros(places.shape, np.uint16)
        tokens[real] = self._entries.tokens(places[real])
        count = real.sum(axis=1)
        return Neighbors.of(tokens, distances, ids, count, copies=copies, places=places)

    def _visible(self, places: Ids, hidden: _Hidden) -> tuple[Ids, npt.NDArray[np.int64]]:
        """The patch ids [N, K] at these places, and how many visible keys each stands for."""
        if not len(self._entries):
            return places, np.zeros(places.shape, np.int64)
        real = places >= 0
        safe = np.where(real, places, 0)
        ids = np.where(real, self._entries.patch_ids(safe), -1)
        copies = np.where(real, self._entries.copies(safe), 0)
        if hidden.nothing:
            return ids, copies
        shown = hidden.shows(slice(None), ids)
        for query, column in zip(*np.nonzero(copies > 1), strict=True):
            # Of an entry with copies, those that may be shown count, and the first one speaks.
            every = self._entries.every_id(int(places[query, column]))
            visible = every[hidden.shows(int(query), every)]
            copies[query, column] = len(visible)
            ids[query, column] = visible[0] if len(visible) else -1
            shown[query, column] = len(visible) > 0
        return ids, np.where(shown, copies, 0)


def open_engine(
    manifest: IndexManifest, folder: Path, codes: Floats
) -> tuple[SearchEngine, EntryTable]:
    """The engine of an index's kind and its entries. Raises IncompatibleError where damaged."""
    if manifest.kind != "codebook":
        return FaissSearch.open(folder), EntryTable([open_entries(folder)])
    layout = CodeLayout(manifest.keys, codes, manifest.weights)
    engine = CodebookSearch(folder, layout, manifest.parts)
    return engine, EntryTable(engine.parts)


def newest_index(layout: Layout) -> str:
    """The folder of the index built last. Raises BadInputError where there is none."""
    folders = index_folders(layout)
    if not folders:
        if not exists(layout.root):
            DatabaseManifest.read(layout)
        raise BadInputError(
            f"database {layout.root} has no index; build one with `arrag-db index"
            f" --db {layout.root}`"
        )
    return max(folders, key=lambda folder: modified(join(folder, "manifest.json")))


def index_folders(layout: Layout) -> Sequence[str]:
    """The folders of complete indexes, by name."""
    folders = (layout.index(name) for name in names_in(layout.indexes) if name[0] != ".")
    return [folder for folder in folders if exists(join(folder, "manifest.json"))]
