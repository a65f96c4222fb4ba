"""Reading patches as a stream: blocks of (patch ids, keys, next tokens), never the whole table.

Everything that trains, fills, measures or verifies reads keys through here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.location import exists, join, names_in
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.specs import KeySpec, key_spec

BLOCK_ROWS = 131_072
_CACHE_BYTES = 16 << 20
"""What Lance may keep of a table's pages between reads, which otherwise grows with the table."""


def patch_tables(layout: Layout) -> list[KeySpec]:
    """The key specs that a database has a patches table for, by name."""
    tables = names_in(join(layout.root, "patches"))
    return [key_spec(*table.removesuffix(".lance").rsplit("-", 2)) for table in tables]


@dataclass(frozen=True)
class PatchBlock:
    """Some patches."""

    patch_ids: Ids
    """int64 [N]."""
    keys: npt.NDArray[Any]
    """uint16 [N, n] tokens, or float16 [N, n · d] latents."""
    next_tokens: npt.NDArray[np.uint16]
    """uint16 [N]."""

    def take(self, rows: npt.NDArray[Any] | slice) -> "PatchBlock":
        """Some of the rows, by ordinals, a mask or a slice."""
        return PatchBlock(self.patch_ids[rows], self.keys[rows], self.next_tokens[rows])


@dataclass(frozen=True)
class TablePart:
    """Some neighbouring fragments of a table."""

    fragments: tuple[int, ...]
    """Their ids."""
    start: int
    """The first row."""
    count: int
    """How many rows from there on."""


class PatchTable:
    """A patches table pinned at one version; its rows keep their order for as long as it is."""

    def __init__(self, path: str, version: int | None = None) -> None:
        if not exists(path):
            raise BadInputError(f"no patches at {path}; build them with `arrag-db build`")
        import lance

        try:
            self._dataset = lance.dataset(
                path,
                version=version,
                index_cache_size_bytes=_CACHE_BYTES,
                metadata_cache_size_bytes=_CACHE_BYTES,
            )
        except (OSError, ValueError) as error:
            raise BadInputError(
                f"version {version} of {path} is gone; index again with `arrag-db index`"
            ) from error
        self.path = path
        self.version: int = self._dataset.version
        self.count: int = self._dataset.count_rows()

    def blocks(self, size: int = BLOCK_ROWS, part: TablePart | None = None) -> Iterator[PatchBlock]:
        """All rows, or those of one part, in order, at most `size` at a time."""
        fragments = [self._dataset.get_fragment(n) for n in part.fragments] if part else None
        scanner = self._dataset.scanner(
            batch_size=size,
            scan_in_order=True,
            fragments=fragments,
            # More of either is no faster, and memory would grow with the table.
            batch_readahead=2,
            fragment_readahead=2,
        )
        yield from map(_block, scanner.to_batches())

    @property
    def mark(self) -> int:
        """The highest number of a fragment, -1 without any; later rows get higher ones."""
        return max((f.fragment_id for f in self._dataset.get_fragments()), default=-1)

    def rows_up_to(self, mark: int) -> int:
        """How many rows are in fragments up to this number."""
        fragments = self._dataset.get_fragments()
        return sum(f.count_rows() for f in fragments if f.fragment_id <= mark)

    def count_without(self, images: Ids) -> int:
        """How many rows belong to other pictures than these, ids in ascending order."""
        if not len(images):
            return self.count
        batches = self._dataset.scanner(columns=["patch_id"], batch_size=1 << 20).to_batches()
        owners = (split_patch_ids(b.column("patch_id").to_numpy())[0] for b in batches)
        return sum(int(np.count_nonzero(~contains(images, owner))) for owner in owners)

    def parts(self, rows: int, *, after: int = -1) -> list[TablePart]:
        """The table cut between fragments into parts of about `rows` rows.

        A part ends before the fragment that would exceed them; a larger fragment stands alone.
        after: only fragments of higher numbers are taken; `start` counts from the first of these.
        """
        parts: list[TablePart] = []
        members: list[int] = []
        start = count = 0
        for fragment in self._dataset.get_fragments():
            if fragment.fragment_id <= after:
                continue
            held = fragment.count_rows()
            if members and count + held > rows:
                parts.append(TablePart(tuple(members), start, count))
                members, start, count = [], start + count, 0
            members.append(fragment.fragment_id)
            count += held
        if members:
            parts.append(TablePart(tuple(members), start, count))
        return parts

    def take(self, rows: Sequence[int] | Ids) -> PatchBlock:
        """The rows at these ordinals, in the order asked for."""
        return _block(self._dataset.take(list(map(int, rows))))

    def sample(self, count: int, *, seed: int) -> PatchBlock:
        """A uniform sample over all shards without repetition; all rows where there are fewer.

        The same rows in the same order whatever order the shards were committed in, until a
        compaction merges fragments in that order.
        """
        return self.take(self._drawn(count, seed))

    def sample_keys(self, count: int, *, seed: int) -> npt.NDArray[Any]:
        """The keys of `sample`, read a block at a time, so that little else is held."""
        rows = self._drawn(count, seed)
        blocks = (
            self._dataset.take(rows[start : start + BLOCK_ROWS].tolist(), columns=["key"])
            for start in range(0, max(len(rows), 1), BLOCK_ROWS)
        )
        return np.concatenate([list_values(block["key"]) for block in blocks])

    def _drawn(self, count: int, seed: int) -> Ids:
        """The ordinals of `sample`: drawn from the fragments in order of their first patch ids."""
        parts = self.parts(1)
        starts = np.array([part.start for part in parts], np.int64)
        sizes = np.array([part.count for part in parts], np.int64)
        firsts = self._dataset.take(starts.tolist(), columns=["patch_id"])["patch_id"]
        order = np.argsort(firsts.to_numpy())
        ends = np.cumsum(sizes[order])
        drawn = _ordinals(self.count, min(count, self.count), seed)
        # From an ordinal in that order to its fragment, and to its ordinal in the table.
        owner = np.searchsorted(ends, drawn, side="right")
        within = drawn - (ends - sizes[order])[owner]
        ordinals: Ids = starts[order][owner] + within
        return ordinals


def _ordinals(total: int, count: int, seed: int) -> Ids:
    """`count` of `total` row numbers, drawn without repetition, ascending.

    Holds no more than a few times `count` numbers, however many there are to draw from.
    """
    if count == total:
        return np.arange(total)
    rng = np.random.default_rng(seed)
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        drawn = np.unique(np.concatenate([drawn, rng.integers(0, total, count)]))
    return np.sort(rng.choice(drawn, count, replace=False))


def _block(rows: pa.Table | pa.RecordBatch) -> PatchBlock:
    ids, tokens = rows["patch_id"].to_numpy(), rows["next_token"].to_numpy()
    return PatchBlock(ids, list_values(rows["key"]), tokens)
