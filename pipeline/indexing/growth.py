"""What there is to index, which index can grow to it, and the folder in which the new one is made.

An index grows where it was made the same way from rows that still stand and holds all pictures that
are wanted; otherwise it is built anew. A folder tells by its plan what it is to become, so that a
killed build goes on only with what is exactly the same.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.images import ImageTable, duplicate_images
from arrag_runtime.format.location import building_folder, delete_place, local_folder, put_folder
from arrag_runtime.format.manifest import LEFT_OUT_FILE, DatabaseManifest, IndexManifest, Layout
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.search.patch_index import index_folders, newest_index
from arrag_runtime.search.tombstones import Tombstones
from schemas.settings.index import IndexSettings
from stages.index.codebook_index import part_rows
from stages.index.index_contents import left_out

OUTGROWN = 4
"""With this many times the keys that its lists were trained for, an index is built anew."""


def unwanted_pictures(layout: Layout, settings: IndexSettings) -> Ids:
    """The pictures that are not to be taken, ascending: removed ones, and copies if unwanted."""
    removed = Tombstones(layout).ids
    if settings.dedup == "images":
        removed = np.union1d(removed, duplicate_images(ImageTable(layout.images), removed))
    return removed


@dataclass(frozen=True)
class StaleIndex:
    """An index to be built: its name, None for that of its kind, and how."""

    name: str | None
    settings: IndexSettings


def stale_index(database: str | Path) -> StaleIndex | None:
    """What a build leaves to be indexed: nothing, a first index, or the newest one again."""
    layout = Layout(database)
    table = PatchTable(layout.patches(DatabaseManifest.read(layout).keys))
    if not table.count:
        return None
    if not index_folders(layout):
        return StaleIndex(None, IndexSettings())
    newest = IndexManifest.read(newest_index(layout))
    if newest.settings["rows"] == table.count and newest.mark == table.mark:
        return None
    return StaleIndex(newest.name, IndexSettings.from_json(newest.settings))


SAME_BUILD = ("kind", "index_key", "lists", "query_ms", "weights", "max_copies", "dedup", "seed")
"""The settings that the files of an index depend on."""


def still_stands(older: IndexManifest, table: PatchTable) -> bool:
    """Whether the rows that an index was made from stand in the fragments they stood in."""
    return table.rows_up_to(older.mark) == int(older.settings["rows"])


def index_to_grow(
    layout: Layout,
    name: str,
    settings: IndexSettings,
    table: PatchTable,
    unwanted: Ids,
    *,
    compacted: bool,
) -> IndexManifest | None:
    """The index of this name where it can be built upon: made the same way from rows that stand,
    or that a compaction has just moved, and holding all pictures that are wanted now."""
    try:
        older = IndexManifest.read(layout.index(name))
    except ArragError:
        return None
    if older.kind != "codebook" or _settings_of(older.settings) != _settings_of(settings.to_json()):
        return None
    if not (compacted or still_stands(older, table)):
        return None
    if len(np.setdiff1d(left_out(local_folder(layout.index(name))), unwanted)):
        return None
    outgrown = table.count > OUTGROWN * older.settings["trained_for"]
    return None if outgrown else older


def _settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in SAME_BUILD}


def work_folder(
    layout: Layout,
    name: str,
    settings: IndexSettings,
    table: PatchTable,
    older: IndexManifest | None,
    unwanted: Ids,
) -> Path:
    """The folder in which the index is being built, as a killed build of the same plan left it."""
    plan = {
        "table_version": table.version,
        "settings": _settings_of(settings.to_json()),
        "grows": None if older is None else [older.table_version, *older.parts],
        "left_out": hashlib.sha256(unwanted.tobytes()).hexdigest(),
        # Where the table is cut into parts.
        "rows": part_rows(settings) if settings.kind == "codebook" else None,
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    work = building_folder(layout.indexes, name)
    resumable = settings.kind == "codebook" and (work / f"plan-{digest}").exists()
    if not resumable:
        shutil.rmtree(work, ignore_errors=True)
        prepare(work, unwanted)
        (work / f"plan-{digest}").touch()
    return work


def prepare(work: Path, unwanted: Ids) -> None:
    """A new work folder that says which pictures are left out."""
    work.mkdir(parents=True)
    if len(unwanted):
        np.save(work / LEFT_OUT_FILE, unwanted)


STEPS = ("plan-*", "weights.json", "fill-*", "slice-*", ".*.writing")
"""What a build needs on its way only; a killed one may have left some of it."""


def put_index(place: str, work: Path) -> None:
    """Put a finished index in place of an older one of its name."""
    for left in (path for pattern in STEPS for path in work.glob(pattern)):
        delete_place(str(left))
    put_folder(work, place)
