"""Find the pictures that a removal means: by a condition, id, hash or address, and their copies.

In: a selection. Out: the rows of the pictures that match, and of those with the same bytes. The
images table is streamed, a few columns at a time, so the work grows with the table and not with
what is asked for.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids, contains
from arrag_runtime.format.images import ImageTable

_BLOCK = 131_072
_COLUMNS = ("image_id", "sha256", "url", "key", "source", "split")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is asked for; a picture matches by any of these."""

    where: str | None = None
    """A Lance filter over the columns of the images table."""
    image_ids: tuple[int, ...] = ()
    hashes: frozenset[str] = frozenset()
    """sha256 of original bytes, in hexadecimal."""
    urls: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """The pictures of a selection that are not hidden yet.

    All tables have the columns image_id, sha256, url, key, source and split.
    """

    matched: pa.Table
    """The pictures that match."""
    copies: pa.Table
    """Others with the bytes of one of them."""
    pictures: pa.Table
    """All of them."""
    already_hidden: int
    """How many more match that are hidden already."""
    shared: frozenset[str]
    """Hashes and addresses of these pictures that pictures which stay have too."""


def find_images(
    images: ImageTable, selection: Selection, hidden: Ids, *, with_copies: bool = True
) -> FoundImages:
    """The pictures of a selection that are not among `hidden` (sorted ids).

    Raises BadInputError, naming the columns, for a condition that cannot be used.
    """
    matched, already = _scan(images, selection, hidden)
    ids = np.sort(matched["image_id"].to_numpy())
    copies = matched.slice(0, 0)
    if with_copies and len(ids):
        hashes = frozenset(matched["sha256"].to_pylist())
        found, _ = _scan(images, Selection(hashes=hashes), hidden)
        copies = found.filter(pa.array(~contains(ids, found["image_id"].to_numpy())))
        ids = np.sort(np.concatenate([ids, copies["image_id"].to_numpy()]))
    both = pa.concat_tables([matched, copies])
    return FoundImages(
        matched=matched,
        copies=copies,
        pictures=both,
        already_hidden=already,
        shared=_shared(images, both, np.union1d(ids, hidden)),
    )


def _scan(images: ImageTable, selection: Selection, hidden: Ids) -> tuple[pa.Table, int]:
    """The rows that match and are not hidden, and how many match and are."""
    wanted = _value_sets({"sha256": selection.hashes, "url": selection.urls})
    asked = np.array(sorted(selection.image_ids), np.int64)
    kept: list[pa.RecordBatch] = []
    already = 0
    for batch in images.batches(list(_COLUMNS), _BLOCK, selection.where):
        ids = batch.column("image_id").to_numpy()
        match = np.full(len(ids), selection.where is not None) | contains(asked, ids)
        for name, values in wanted.items():
            match |= _is_in(batch.column(name), values)
        is_hidden = contains(hidden, ids)
        already += int(np.count_nonzero(match & is_hidden))
        if (match & ~is_hidden).any():
            kept.append(batch.filter(pa.array(match & ~is_hidden)))
    return pa.Table.from_batches(kept, schema=images.schema(_COLUMNS)), already


def _shared(images: ImageTable, pictures: pa.Table, leaving: Ids) -> frozenset[str]:
    """The hashes and addresses of these pictures that others have, which are not `leaving`."""
    wanted = _value_sets({name: pictures[name].to_pylist() for name in ("sha256", "url")})
    shared: set[str] = set()
    if not wanted:
        return frozenset()
    for batch in images.batches(["image_id", *wanted], _BLOCK):
        stays = ~contains(leaving, batch.column("image_id").to_numpy())
        for name, values in wanted.items():
            column = batch.column(name)
            shared.update(column.filter(pa.array(stays & _is_in(column, values))).to_pylist())
    return frozenset(shared)


def _value_sets(wanted: Mapping[str, Iterable[str | None]]) -> dict[str, pa.Array]:
    """The values to look for in each column, without columns that nothing is looked for in."""
    sets = {name: sorted({v for v in values if v is not None}) for name, values in wanted.items()}
    return {name: pa.array(values, pa.string()) for name, values in sets.items() if values}


def _is_in(column: pa.Array, values: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.is_in(column, values), dtype=bool)


def hash_files(paths: Sequence[Path]) -> frozenset[str]:
    """The sha256 of these files' bytes. Raises BadInputError for one that cannot be read."""
    hashes = set()
    for path in paths:
        try:
            hashes.add(hashlib.sha256(path.expanduser().read_bytes()).hexdigest())
        except OSError as error:
            raise BadInputError(f"cannot read --like '{path}': {error.strerror}") from error
    return frozenset(hashes)
