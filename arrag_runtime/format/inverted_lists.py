"""One part of a codebook index: its inverted lists in files that are mapped, never read in.

A part is a folder. Its entries stand list by list; within a list they follow their codes, next
tokens and patch ids, so the same entries make the same bytes whoever wrote them and in whatever
order:

    list_starts.npy   int64 [L + 1]   where each list begins
    codes.bin         uint8 [E, size] the packed keys (arrag_runtime/format/codes.py)
    next_tokens.bin   uint16 [E]
    patch_ids.bin     int64 [E]
    copies_at.npy     int64 [C]       the entries that stand for several identical ones, ascending
    copies_start.npy  int64 [C + 1]   where their ids begin in
    copies_ids.bin    int64 [M]       the patch ids of all of those, ascending within an entry

Identical entries are those of the same key and next token. faiss scans the mapped codes in place;
next tokens and ids are read for the results alone. An index has one part, and a few more where it
has grown; its manifest names them.
"""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import IncompatibleError
from arrag_runtime.format.ids import Ids

STARTS, CODES, TOKENS, IDS = "list_starts.npy", "codes.bin", "next_tokens.bin", "patch_ids.bin"
CENTROIDS, GRAPH = "centroids.npy", "coarse.hnsw"
"""Beside the parts: float32 [L, n · d], and faiss' graph over them where there are very many."""
COPIES_AT, COPIES_START, COPIES_IDS = "copies_at.npy", "copies_start.npy", "copies_ids.bin"
_STREAMED = (CODES, TOKENS, IDS, COPIES_IDS)
"""The files that are written piece by piece."""


@dataclass(frozen=True)
class Entries:
    """Some entries of some lists."""

    lists: npt.NDArray[Any]
    """Integers [E]."""
    codes: npt.NDArray[np.uint8]
    """uint8 [E, size]."""
    next_tokens: npt.NDArray[np.uint16]
    """uint16 [E]."""
    patch_ids: Ids
    """int64 [E]."""


@dataclass(frozen=True)
class ListPart:
    """The arrays of a part; see the module. `codes` are uint8 [E, size]."""

    folder: Path
    starts: Ids
    codes: npt.NDArray[np.uint8]
    next_tokens: npt.NDArray[np.uint16]
    patch_ids: Ids
    copies_at: Ids
    copies_start: Ids
    copies_ids: Ids

    @staticmethod
    def open(folder: Path, code_size: int) -> "ListPart":
        """Map the part in this folder. Raises IncompatibleError where its files are damaged."""
        try:
            starts, at, copies_start = (
                np.load(folder / name, mmap_mode="r") for name in (STARTS, COPIES_AT, COPIES_START)
            )
            entries = int(starts[-1])
            codes = _mapped(folder / CODES, np.uint8, entries, code_size)
            tokens = _mapped(folder / TOKENS, np.uint16, entries)
            ids = _mapped(folder / IDS, np.int64, entries)
            copies_ids = _mapped(folder / COPIES_IDS, np.int64, int(copies_start[-1]))
            return ListPart(folder, starts, codes, tokens, ids, at, copies_start, copies_ids)
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise IncompatibleError(
                f"index part {folder} is damaged or incomplete ({error}); index again"
            ) from error

    @property
    def entries(self) -> int:
        """How many entries are stored."""
        return int(self.starts[-1])

    @property
    def keys(self) -> int:
        """How many keys they stand for: identical ones that are stored once count each."""
        return self.entries - len(self.copies_at) + len(self.copies_ids)

    def every_id(self) -> Ids:
        """The patch ids of all keys, copies included, in no particular order."""
        single = np.ones(self.entries, bool)
        single[self.copies_at] = False
        return np.concatenate([self.patch_ids[single], self.copies_ids])


def _mapped(path: Path, dtype: type, *shape: int) -> Any:
    """A file as an array, mapped; one of another size than the shape asks for is refused."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path.name} has {found} bytes, expected {size}")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=shape) if size else np.empty(shape, dtype)


class PartWriter:
    """Writes a part from one end to the other; the folder appears complete or not at all."""

    def __init__(self, folder: Path, lists: int) -> None:
        self._folder, self._sizes = folder, np.zeros(lists, np.int64)
        self._draft = folder.with_name(f".{folder.name}.writing")
        self._at = [np.empty(0, np.int64)]
        self._counts = [np.empty(0, np.int64)]
        self._files = ExitStack()

    def __enter__(self) -> "PartWriter":
        shutil.rmtree(self._draft, ignore_errors=True)
        self._draft.mkdir(parents=True)
        paths = [self._draft / name for name in _STREAMED]
        self._streams = [self._files.enter_context(path.open("wb")) for path in paths]
        return self

    def add(self, entries: Entries, copies: Ids, copies_ids: Ids) -> None:
        """Append entries, list by list, of lists at or after those so far.

        copies: int64 [E], how many keys each entry stands for; copies_ids: the patch ids of all
        that stand for more than one, in order.
        """
        at = np.flatnonzero(copies > 1)
        self._at.append(at + self._sizes.sum())
        self._counts.append(copies[at])
        self._sizes += np.bincount(entries.lists, minlength=len(self._sizes))
        columns = (entries.codes, entries.next_tokens, entries.patch_ids, copies_ids)
        for stream, values in zip(self._streams, columns, strict=True):
            np.ascontiguousarray(values).tofile(stream)

    def append(self, part: ListPart) -> None:
        """Append a part whose lists are at or after those so far, its files copied as they are."""
        self._at.append(part.copies_at + self._sizes.sum())
        self._counts.append(np.diff(part.copies_start))
        self._sizes += np.diff(part.starts)
        for name, stream in zip(_STREAMED, self._streams, strict=True):
            with (part.folder / name).open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 22)

    def __exit__(self, kind: object, *_: object) -> None:
        self._files.close()
        if kind is not None:
            shutil.rmtree(self._draft)
            return
        np.save(self._draft / STARTS, np.concatenate([[0], np.cumsum(self._sizes)]))
        np.save(self._draft / COPIES_AT, np.concatenate(self._at))
        ends = np.cumsum(np.concatenate(self._counts))
        np.save(self._draft / COPIES_START, np.concatenate([[0], ends]))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._draft.rename(self._folder)
