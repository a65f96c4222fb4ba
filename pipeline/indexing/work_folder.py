"""The folder in which an index is made, until it is put in place.

It tells by its plan what it is to become, so that a killed build goes on only with what is exactly
the same. An index in place is never changed: a new one shares its files, so whoever searches the
old one goes on doing so.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.location import building_folder, delete_place, put_folder
from arrag_runtime.format.manifest import LEFT_OUT_FILE, IndexManifest, Layout
from arrag_runtime.format.patches import PatchTable
from pipeline.indexing.growth import decisive_settings
from schemas.settings.index import IndexSettings
from stages.index.codebook_index import part_rows

_ON_THE_WAY = ("plan-*", "weights.json", "fill-*", "slice-*", ".*.writing")
"""What a build needs on its way only; a killed one may have left some of it."""


def work_folder(
    layout: Layout,
    name: str,
    settings: IndexSettings,
    table: PatchTable,
    older: IndexManifest | None,
    unwanted: Ids,
) -> Path:
    """The folder in which the index is made, as a killed build of the same plan left it.

    older: the index that is built upon; None for a fresh one. unwanted: pictures to leave out.
    """
    plan = {
        "table_version": table.version,
        "settings": decisive_settings(settings.to_json()),
        "grows": None if older is None else [older.table_version, *older.parts],
        "left_out": hashlib.sha256(unwanted.tobytes()).hexdigest(),
        # Where the table is cut into parts.
        "rows": part_rows(settings) if settings.kind == "codebook" else None,
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    work = building_folder(layout.indexes, name)
    mark = work / f"plan-{digest}"
    if settings.kind != "codebook" or not mark.exists():
        empty_work_folder(work, unwanted)
        mark.touch()
    return work


def empty_work_folder(work: Path, unwanted: Ids) -> None:
    """A new folder, whatever was there, that says which pictures are left out."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if len(unwanted):
        np.save(work / LEFT_OUT_FILE, unwanted)


def link_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Make files and folders of one index part of another, without copying where a link will do."""
    for name in names:
        origin = source / name
        if origin.is_dir():
            (target / name).mkdir(exist_ok=True)
            link_files(origin, target / name, [path.name for path in origin.iterdir()])
        elif origin.exists() and not (target / name).exists():
            try:
                os.link(origin, target / name)
            except OSError:
                # A killed copy must not pass for a whole one.
                draft = target / f".{name}.writing"
                shutil.copy2(origin, draft)
                draft.rename(target / name)


def put_index(place: str, work: Path) -> None:
    """Put a finished index in place of an older one of its name."""
    for left in (path for pattern in _ON_THE_WAY for path in work.glob(pattern)):
        delete_place(str(left))
    put_folder(work, place)
