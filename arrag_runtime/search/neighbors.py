"""What a search returns, and the entries it stands on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.inverted_lists import ListPart
from arrag_runtime.format.specs import Floats


@dataclass(frozen=True)
class Neighbors:
    """The nearest entries of N queries, nearest first; `Neighbors.of` makes them.

    Each query has K columns, of which the first `count` are real. The others are padding, whose
    values are part of the type; no reader may use them.
    """

    tokens: npt.NDArray[np.uint16]
    """uint16 [N, K], the next tokens of the entries; padding is 0."""
    distances: Floats
    """float32 [N, K], squared L2, weighted where offsets have weights; padding is infinite."""
    patch_ids: Ids
    """int64 [N, K]; padding is -1."""
    count: npt.NDArray[np.int64]
    """int64 [N], how many of the K are real."""
    copies: npt.NDArray[np.int64]
    """int64 [N, K], how many entries of one key and next token a result is for; padding is 0."""
    places: Ids
    """int64 [N, K], the row in the table or place in the index; -1 where not known, and padding."""
    weights: Floats
    """float32 [N, K], the weight of the database that a result is from; padding is 0."""
    origin: npt.NDArray[np.uint8]
    """uint8 [N, K], which of the databases searched as one a result is from; padding is 0."""

    @staticmethod
    def of(
        tokens: npt.NDArray[np.uint16],
        distances: Floats,
        patch_ids: Ids,
        count: npt.NDArray[np.int64],
        *,
        copies: npt.NDArray[np.int64] | None = None,
        places: Ids | None = None,
    ) -> "Neighbors":
        """Those of one database of weight 1, from arrays that may hold anything beyond `count`.

        copies: 1 for each by default; places: not known by default.
        """
        real = _columns_within(count, tokens.shape[1])
        return Neighbors(
            tokens=np.where(real, tokens, 0).astype(np.uint16),
            distances=np.where(real, distances, np.inf).astype(np.float32),
            patch_ids=np.where(real, patch_ids, -1),
            count=count.astype(np.int64),
            copies=np.where(real, 1 if copies is None else copies, 0).astype(np.int64),
            places=np.where(real, -1 if places is None else places, -1),
            weights=real.astype(np.float32),
            origin=np.zeros(real.shape, np.uint8),
        )

    @staticmethod
    def chosen(found: Sequence["Neighbors"], order: Ids) -> "Neighbors":
        """Of several answers to the same queries the entries at these columns int64 [N, K].

        Columns are counted through the answers, as if these stood side by side. Padding must be
        chosen last.
        """
        columns: dict[str, npt.NDArray[Any]] = {
            field.name: np.take_along_axis(
                np.concatenate([getattr(one, field.name) for one in found], axis=1), order, axis=1
            )
            for field in fields(Neighbors)
            if field.name != "count"
        }
        return Neighbors(count=(columns["patch_ids"] >= 0).sum(axis=1), **columns)

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """Which results are no padding, bool [N, K]."""
        return _columns_within(self.count, self.tokens.shape[1])

    def take(self, queries: npt.NDArray[Any] | slice) -> "Neighbors":
        """Those of some of the queries, by ordinals, a mask or a slice."""
        return Neighbors(
            **{field.name: getattr(self, field.name)[queries] for field in fields(self)}
        )


def _columns_within(count: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.bool_]:
    """For each of N queries the first `count` of `width` columns, bool [N, width]."""
    within: npt.NDArray[np.bool_] = np.arange(width) < count[:, None]
    return within


class EntryTable:
    """The entries of an index by place: next token, patch id, and the ids of identical ones."""

    def __init__(self, parts: Sequence[ListPart]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.entries for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def keys(self) -> int:
        """How many keys the entries stand for."""
        return sum(part.keys for part in self._parts)

    def tokens(self, places: Ids) -> npt.NDArray[np.uint16]:
        """The next tokens at these places, an array of any shape without -1."""
        return self._gather(places, [part.next_tokens for part in self._parts])

    def patch_ids(self, places: Ids) -> Ids:
        """The patch ids; of an entry with copies, the lowest one."""
        return self._gather(places, [part.patch_ids for part in self._parts])

    def copies(self, places: Ids) -> npt.NDArray[np.int64]:
        """How many keys the entries at these places stand for."""
        counts = np.ones(places.shape, np.int64)
        for part, end in zip(self._parts, self._ends, strict=True):
            if len(part.copies_at):
                local = places - (end - part.entries)
                at = np.minimum(np.searchsorted(part.copies_at, local), len(part.copies_at) - 1)
                hit = part.copies_at[at] == local
                counts[hit] = np.diff(part.copies_start)[at[hit]]
        return counts

    def every_id(self, place: int) -> Ids:
        """The ids of all keys that the entry at this place stands for, ascending."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self._parts[number]
        local = place - (self._ends[number] - part.entries)
        at = int(np.searchsorted(part.copies_at, local))
        if at < len(part.copies_at) and part.copies_at[at] == local:
            return part.copies_ids[part.copies_start[at] : part.copies_start[at + 1]]
        return part.patch_ids[local : local + 1]

    def _gather(self, places: Ids, columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        if len(columns) == 1:
            return np.take(columns[0], places)
        values = np.empty(places.shape, columns[0].dtype)
        number = np.searchsorted(self._ends, places, side="right")
        for index, column in enumerate(columns):
            here = number == index
            values[here] = column[places[here] - (self._ends[index] - len(column))]
        return values
