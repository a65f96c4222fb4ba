"""What an index holds, streamed, and a checksum by which it is compared with its table.

In: the folder of an index. Out: blocks of (patch ids, next tokens, keys), copies written out; keys
only where the index keeps them whole. The checksum of a set of entries does not depend on their
order.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.inverted_lists import ListPart
from arrag_runtime.format.manifest import LEFT_OUT_FILE, IndexManifest
from arrag_runtime.format.patches import BLOCK_ROWS, PatchBlock
from arrag_runtime.format.specs import Floats
from arrag_runtime.search.faiss_search import open_entries
from stages.index.fill_lists import expanded, list_groups

_Hashes = npt.NDArray[np.uint64]


def left_out(folder: Path) -> Ids:
    """The pictures that the index in this folder leaves out, ascending."""
    path = folder / LEFT_OUT_FILE
    ids: Ids = np.load(path) if path.exists() else np.empty(0, np.int64)
    return ids


def index_contents(folder: Path, manifest: IndexManifest, codes: Floats) -> Iterator[PatchBlock]:
    """The entries of an index. Keys are uint16 [N, n] of a codebook index, else of no columns.

    Raises IncompatibleError where it is damaged.
    """
    if manifest.kind != "codebook":
        held = open_entries(folder)
        keys = np.empty((len(held.patch_ids), 0), np.uint16)
        every = PatchBlock(held.patch_ids, keys, held.next_tokens)
        for start in range(0, len(keys), BLOCK_ROWS):
            yield every.take(slice(start, start + BLOCK_ROWS))
        return
    layout = CodeLayout(manifest.keys, codes, manifest.weights)
    for name in manifest.parts:
        part = ListPart.open(folder / name, layout.size)
        for start, stop in list_groups([part], 0, len(part.starts) - 1):
            entries = expanded(part, start, stop)
            keys = layout.unpack(entries.codes)
            yield PatchBlock(entries.patch_ids, keys, entries.next_tokens)


def checksum(blocks: Iterable[PatchBlock], hidden: Ids, *, keys: bool) -> tuple[int, int]:
    """How many entries there are of pictures that are not `hidden` (ascending), and their checksum.

    keys: whether keys count, besides patch ids and next tokens.
    """
    count = total = 0
    for block in blocks:
        shown = ~contains(hidden, split_patch_ids(block.patch_ids)[0])
        hashes = _mixed(block.patch_ids[shown].astype(np.uint64))
        for column in (block.next_tokens[shown], *(block.keys[shown].T if keys else ())):
            hashes = _mixed(hashes ^ column.astype(np.uint64))
        count += len(hashes)
        total = (total + int(hashes.sum(dtype=np.uint64))) % (1 << 64)
    return count, total


def _mixed(values: _Hashes) -> _Hashes:
    """splitmix64, by which every bit of a value moves half of the result's."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
