"""Take the bytes of removed pictures out of a database, and merge its many small fragments.

book the losses in the ledger → delete the rows from every patches table, then from the images →
write the tables anew → end in the ledger → build the indexes again that hold something of them.
Killed at any moment it is run again: what is still there of a removed picture is taken out, and no
picture is booked twice.
"""

import datetime
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.ids import Ids, contains
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.location import exists, remove, size
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout
from arrag_runtime.format.patches import PatchTable, patch_tables
from arrag_runtime.search.patch_index import index_folders
from arrag_runtime.search.tombstones import Tombstones
from pipeline.index import index_database
from pipeline.remove import take_out_suppressed
from pipeline.resources.lease import lease
from pipeline.verify import index_owners
from schemas.settings.index import IndexSettings
from stages.index.faiss_index import require_autofaiss
from stages.tables.committer import Committer, Loss
from stages.tables.deletion import booked_removals, compact_table, delete_pictures
from stages.tables.ledger import read_ledger

COMMAND = "arrag-db compact"
KEEP_VERSIONS = datetime.timedelta(minutes=2)
"""Of tables that hold nothing of a picture, for those who just read them."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did. bytes are those of tables and indexes on disk."""

    images: int
    patches: int
    bytes_before: int
    bytes_after: int
    indexes: tuple[str, ...]

    def to_text(self) -> str:
        """One line for people."""
        built = f"; built again: {', '.join(self.indexes)}" if self.indexes else ""
        return (
            f"took out {self.images:,} pictures with {self.patches:,} patches;"
            f" {self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB now{built}"
        )


Progress = Callable[[str], None]
"""Called with what is being done, before every step."""


def compact(database: str | Path, progress: Progress = lambda _step: None) -> Compaction:
    """Compact a database; see the module. Raises ArragError where it is busy or there is none."""
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    before = _bytes(layout)
    if any(IndexManifest.read(folder).kind == "ivfpq" for folder in index_folders(layout)):
        # It will have to be built again.
        require_autofaiss()
    with lease(layout, COMMAND) as held:
        committer = Committer(layout, manifest.keys, held.check)
        # From here on whatever the tables hold is complete.
        committer.recover(read_ledger(layout))
        whole = {folder for folder in index_folders(layout) if _holds_all(layout, folder)}
        take_out_suppressed(database, COMMAND)
        gone = Tombstones(layout).ids
        losses = _losses(layout, manifest, gone)
        committer.begin_compaction(losses)
        patches = 0
        for keys in patch_tables(layout):
            held.check()
            progress(f"deleting from {keys.name}")
            deleted = delete_pictures(layout.patches(keys), "patch_id", gone)
            patches += deleted
            progress(f"writing {keys.name} anew")
            compact_table(layout.patches(keys))
        held.check()
        progress("writing the images anew")
        images = delete_pictures(layout.images, "image_id", gone)
        compact_table(layout.images)
        for path in (layout.rejects, layout.ledger, layout.removed):
            if exists(path):
                compact_table(path, keep=KEEP_VERSIONS)
        held.check()
        Committer(layout, manifest.keys, held.check).end_compaction()
    indexes = []
    for folder in index_folders(layout):
        if _is_outdated(layout, folder, gone):
            name = Path(folder).name
            progress(f"building index {name} again")
            _build_again(layout, folder, compacted=folder in whole)
            indexes.append(name)
    return Compaction(images, patches, before, _bytes(layout), tuple(indexes))


def _losses(layout: Layout, manifest: DatabaseManifest, gone: Ids) -> list[Loss]:
    """What the tables will lose, by shard, without what an interrupted compaction has booked."""
    booked = booked_removals(layout)
    spec = manifest.tokenizer
    per_image = manifest.keys.neighborhood.positions(spec.grid_height, spec.grid_width).size
    shards: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    columns = ["image_id", "shard", "source", "split"]
    for batch in ImageTable(layout.images).batches(columns, 131_072):
        ids = batch.column("image_id").to_numpy()
        for at in np.flatnonzero(contains(gone, ids) & ~contains(booked, ids)).tolist():
            row = {name: batch.column(name)[at].as_py() for name in columns}
            held_out = row["split"] == "heldout"
            shards[row["shard"], row["source"]].append((row["image_id"], held_out))
    return [
        Loss(
            shard,
            source,
            tuple(image for image, _ in lost),
            heldout=sum(held_out for _, held_out in lost),
            patches=per_image * sum(not held_out for _, held_out in lost),
        )
        for (shard, source), lost in sorted(shards.items())
    ]


def _is_outdated(layout: Layout, folder: str, gone: Ids) -> bool:
    """Whether an index holds something of these pictures, or names a table version that is gone."""
    index = IndexManifest.read(folder)
    try:
        PatchTable(layout.patches(index.keys), index.table_version)
        return bool(index_owners(layout, Path(folder).name, gone))
    except ArragError:
        return True


def _holds_all(layout: Layout, folder: str) -> bool:
    """Whether an index was made from all rows of its table, so that it only has to lose some."""
    index = IndexManifest.read(folder)
    table = PatchTable(layout.patches(index.keys))
    return (table.count, table.mark) == (index.settings["rows"], index.mark)


def _build_again(layout: Layout, folder: str, *, compacted: bool) -> None:
    """Build an index again, the way it was made; without any patches there is none."""
    made = IndexManifest.read(folder)
    if not PatchTable(layout.patches(made.keys)).count:
        remove(folder)
        return
    settings = IndexSettings.from_json(made.settings)
    index_database(layout.root, settings, name=Path(folder).name, compacted=compacted)


def _bytes(layout: Layout) -> int:
    return size(layout.root)
