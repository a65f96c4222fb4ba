"""Filling the lists of a codebook index: blocks of keys → parts → one part in canonical order.

A part that is being filled has its entries list by list and no more. Merging takes any number of
parts and writes one in which every list is in order of code, next token and patch id, so that the
same keys give the same bytes however they were cut into parts. Identical entries (same key, same
next token) beyond `max_copies` are stored once and keep all their ids. faiss never encodes
anything: the tokens are the codes.

In memory at once: the packed entries of a part when filling, one group of lists when merging.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.inverted_lists import Entries, ListPart, PartWriter
from arrag_runtime.format.patches import PatchBlock
from arrag_runtime.format.specs import Floats, key_vectors

Finder = Callable[[Floats], Ids]
"""The list int64 [N] of search vectors float32 [N, D]; a `ListFinder`, say."""
MERGE_ENTRIES = 1 << 20
"""Entries merged at a time: about 50 MB with everything that sorting them takes."""
HELD_A_KEY = 48
"""Bytes that filling takes per key of a part: list, code, next token, id and the lists' order."""


def fill_part(
    folder: Path,
    blocks: Iterable[PatchBlock],
    finder: Finder,
    layout: CodeLayout,
    *,
    lists: int,
    keys: int,
) -> None:
    """Write the keys of these blocks as a part: list by list, in each as they came.

    keys: how many there are (or more); packed they are held in memory, at `HELD_A_KEY` bytes each.
    The part appears complete or not at all.
    """
    held = Entries(
        np.empty(keys, np.uint16 if lists <= 1 << 16 else np.int32),
        np.empty((keys, layout.size), np.uint8),
        np.empty(keys, np.uint16),
        np.empty(keys, np.int64),
    )
    end = 0
    for block in blocks:
        start, end = end, end + len(block.patch_ids)
        held.lists[start:end] = finder(key_vectors(block.keys, layout.codes, layout.weights))
        held.codes[start:end] = layout.pack(block.keys)
        held.next_tokens[start:end] = block.next_tokens
        held.patch_ids[start:end] = block.patch_ids
    order = np.argsort(held.lists[:end], kind="stable")
    with PartWriter(folder, lists) as part:
        for start in range(0, end, MERGE_ENTRIES):
            some = _take(held, order[start : start + MERGE_ENTRIES])
            part.add(some, np.ones(len(some.lists), np.int64), some.patch_ids[:0])


def merge_parts(
    folder: Path,
    parts: Sequence[ListPart],
    layout: CodeLayout,
    *,
    max_copies: int,
    left_out: Ids | None = None,
    lists: tuple[int, int] | None = None,
) -> None:
    """Write all entries of these parts as one part in canonical order.

    left_out: int64, ascending; the entries of these pictures are not taken. lists: first and one
    past the last list to take, for a merge that is cut up; all by default.
    """
    total = len(parts[0].starts) - 1
    first, last = lists or (0, total)
    with PartWriter(folder, total) as writer:
        for start, stop in list_groups(parts, first, last):
            entries = _concatenated([expanded(part, start, stop) for part in parts])
            if left_out is not None and len(left_out):
                images = split_patch_ids(entries.patch_ids)[0]
                entries = _take(entries, np.flatnonzero(~contains(left_out, images)))
            writer.add(*collapse(_in_order(entries, layout), max_copies))


def append_parts(folder: Path, slices: Sequence[ListPart]) -> None:
    """Write parts that hold neighbouring ranges of lists one behind the other."""
    with PartWriter(folder, len(slices[0].starts) - 1) as writer:
        for part in slices:
            writer.append(part)


def collapse(ordered: Entries, max_copies: int) -> tuple[Entries, Ids, Ids]:
    """Store identical entries once where there are more than `max_copies` of them.

    Returns the entries, how many each stands for int64 [E], and the ids of those that stand for
    more than one, in order.
    """
    count = len(ordered.lists)
    if not count:
        return ordered, np.empty(0, np.int64), ordered.patch_ids
    differs = (ordered.codes[1:] != ordered.codes[:-1]).any(axis=1)
    differs |= ordered.lists[1:] != ordered.lists[:-1]
    differs |= ordered.next_tokens[1:] != ordered.next_tokens[:-1]
    run = np.concatenate([[0], np.cumsum(differs)])
    lengths = np.bincount(run)
    many = lengths[run] > max_copies
    starts = np.concatenate([[True], differs])
    kept = np.flatnonzero(~many | starts)
    copies = np.where(many[kept], lengths[run[kept]], 1)
    return _take(ordered, kept), copies, ordered.patch_ids[many]


def _in_order(entries: Entries, layout: CodeLayout) -> Entries:
    """Entries by list, key, next token and id, sorted stably from the last criterion on."""
    keys = layout.unpack(entries.codes)
    order = np.argsort(entries.patch_ids)
    for column in (entries.next_tokens, *keys.T[::-1]):
        order = order[np.argsort(column[order], kind="stable")]
    lists = _narrow(entries.lists)
    return _take(entries, order[np.argsort(lists[order], kind="stable")])


def _narrow(lists: Ids) -> npt.NDArray[Any]:
    """Lists as numbers of 16 bits in the same order, which numpy sorts several times as fast."""
    low = int(lists.min()) if len(lists) else 0
    if not len(lists) or lists.max() - low >= 1 << 16:
        return lists
    return (lists - low).astype(np.uint16)


def _take(entries: Entries, rows: Ids) -> Entries:
    return Entries(**{name: column[rows] for name, column in vars(entries).items()})


def list_groups(parts: Sequence[ListPart], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of lists that hold up to `MERGE_ENTRIES` in all parts; a larger list stands alone."""
    ends = np.cumsum(sum(np.diff(part.starts) for part in parts))
    start = first
    while start < last:
        before = ends[start - 1] if start else 0
        full = int(np.searchsorted(ends, before + MERGE_ENTRIES, side="right"))
        stop = min(max(full, start + 1), last)
        yield start, stop
        start = stop


def expanded(part: ListPart, start: int, stop: int) -> Entries:
    """The keys of lists start..stop-1 of a part, every copy as an entry of its own."""
    begin, end = int(part.starts[start]), int(part.starts[stop])
    sizes = np.diff(part.starts[start : stop + 1])
    entries = Entries(
        np.repeat(np.arange(start, stop), sizes),
        np.asarray(part.codes[begin:end]),
        np.asarray(part.next_tokens[begin:end]),
        np.asarray(part.patch_ids[begin:end]),
    )
    low, high = np.searchsorted(part.copies_at, (begin, end))
    if low == high:
        return entries
    counts = np.ones(end - begin, np.int64)
    counts[part.copies_at[low:high] - begin] = np.diff(part.copies_start[low : high + 1])
    repeated = np.repeat(np.arange(end - begin), counts)
    ids = entries.patch_ids[repeated]
    ids[counts[repeated] > 1] = part.copies_ids[part.copies_start[low] : part.copies_start[high]]
    return replace(_take(entries, repeated), patch_ids=ids)


def _concatenated(several: Sequence[Entries]) -> Entries:
    names = (field.name for field in fields(Entries))
    return Entries(**{name: np.concatenate([vars(one)[name] for one in several]) for name in names})
