"""What becomes of the index that is in place: facts about it, and a pure decision from them.

A codebook index is built upon where it was made the same way from rows that still stand, and holds
all pictures that are wanted; otherwise the new one is built from nothing. In: the database, the
settings and the index of the same name. Out: which parts are kept, filled and merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.images import ImageTable, duplicate_images
from arrag_runtime.format.location import local_folder
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.search.patch_index import index_folders, newest_index
from arrag_runtime.search.tombstones import Tombstones
from schemas.settings.index import IndexSettings
from stages.index.index_contents import left_out

_MOST_PARTS = 8
"""A search pays for every part; when there would be more, they are merged."""
_OUTGROWN = 4
"""With this many times the keys that its lists were trained for, an index is built from nothing."""
_DECISIVE = ("kind", "index_key", "lists", "query_ms", "weights", "max_copies", "dedup", "seed")


def index_to_build(database: str | Path) -> tuple[str | None, IndexSettings] | None:
    """What a build leaves to be indexed: nothing, a first index, or the newest one again.

    Its name, None for that of its kind, and how it is to be made.
    """
    layout = Layout(database)
    table = PatchTable(layout.patches(DatabaseManifest.read(layout).keys))
    if not table.count:
        return None
    if not index_folders(layout):
        return None, IndexSettings()
    newest = IndexManifest.read(newest_index(layout))
    if newest.settings["rows"] == table.count and newest.mark == table.mark:
        return None
    return newest.name, IndexSettings.from_json(newest.settings)


def unwanted_pictures(layout: Layout, settings: IndexSettings) -> Ids:
    """The pictures that are not to be taken, ascending: removed ones, and copies if unwanted."""
    removed = Tombstones(layout).ids
    if settings.dedup == "images":
        removed = np.union1d(removed, duplicate_images(ImageTable(layout.images), removed))
    return removed


@dataclass(frozen=True)
class Facts:
    """What decides whether an index that was made the same way is built upon."""

    parts: tuple[str, ...]
    mark: int
    """The highest fragment of the table that it holds rows of."""
    rows_stand: bool
    """Whether its rows are in the fragments in which they were when it was made."""
    compacted: bool
    """Whether the table was just compacted, and the index held all of its rows before."""
    new_rows: bool
    """Whether the table has later fragments."""
    outgrown: bool
    """Whether the table has many times the keys that its lists were trained for."""
    lacks_wanted: bool
    """Whether it left out pictures that are wanted now."""
    holds_unwanted: bool
    """Whether it may hold pictures that have since been removed, or become copies."""


@dataclass(frozen=True)
class Decision:
    """The parts that a new index is made of, by name.

    Four ways: fresh fills one part and keeps none; grow fills one more, and may then merge them
    all; rewrite merges those that are there and fills none; keep takes them as they are.
    """

    kept: tuple[str, ...] = ()
    """Parts of the index in place, taken over without copying."""
    filled: str | None = None
    """The part to fill with rows that the kept ones do not hold; None for none."""
    after: int = -1
    """Only rows of fragments with higher numbers are filled in."""
    merged: str | None = None
    """The part that all of these become, without what is unwanted; None where they stay."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What is kept and filled, before it is merged."""
        return self.kept if self.filled is None else (*self.kept, self.filled)

    @property
    def rewrites(self) -> bool:
        """Whether all of it comes from the index in place, and some of it may have to go."""
        return self.merged is not None and self.filled is None


def next_part(parts: Sequence[str]) -> str:
    """A name that none of these parts has."""
    return f"part-{1 + max((int(part.rpartition('-')[2]) for part in parts), default=-1):04}"


FRESH = Decision(filled=next_part(()))


def decide(facts: Facts) -> Decision:
    """How the new index is made."""
    known = facts.rows_stand or facts.compacted
    if facts.outgrown or facts.lacks_wanted or not known:
        return FRESH
    # Rows that a compaction moved are all in the index: some of it goes, and nothing comes.
    fills = facts.rows_stand and facts.new_rows
    decided = Decision(facts.parts, next_part(facts.parts) if fills else None, facts.mark)
    merges = not facts.rows_stand or facts.holds_unwanted or len(decided.parts) > _MOST_PARTS
    return replace(decided, merged=next_part(decided.parts)) if merges else decided


def decisive_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an index's settings that its files depend on."""
    return {name: settings.get(name) for name in _DECISIVE}


def index_made_alike(place: str, settings: IndexSettings) -> IndexManifest | None:
    """The codebook index at this place, where it was made the way that is asked for now."""
    try:
        older = IndexManifest.read(place)
    except ArragError:
        return None
    alike = decisive_settings(older.settings) == decisive_settings(settings.to_json())
    return older if alike and older.kind == "codebook" else None


def facts_of(
    place: str, older: IndexManifest, table: PatchTable, unwanted: Ids, *, compacted: bool
) -> Facts:
    """The facts of the index at this place. unwanted: pictures not to be taken now, ascending."""
    before = left_out(local_folder(place))
    return Facts(
        parts=older.parts,
        mark=older.mark,
        rows_stand=table.rows_up_to(older.mark) == int(older.settings["rows"]),
        compacted=compacted,
        new_rows=table.mark > older.mark,
        outgrown=table.count > _OUTGROWN * int(older.settings["trained_for"]),
        lacks_wanted=len(np.setdiff1d(before, unwanted)) > 0,
        holds_unwanted=len(np.setdiff1d(unwanted, before)) > 0,
    )
