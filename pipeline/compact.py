"""Delete the bytes of removed pictures from a database, and merge its many small fragments.

record the deletions in the ledger → delete the rows from every patches table, then from the images
→ write the tables anew → end in the ledger → build the indexes again that hold something of them.
Killed at any moment it is run again: what is still there of a removed picture is deleted, and no
deletion is recorded twice.
"""

import datetime
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.ids import Ids, contains
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.location import delete_place, exists, stored_bytes
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout
from arrag_runtime.format.patches import PatchTable, patch_tables
from arrag_runtime.search.patch_index import index_folders
from arrag_runtime.search.tombstones import Tombstones
from pipeline.index import index
from pipeline.remove import hide_suppressed
from pipeline.resources.lease import lease
from pipeline.verify import indexed_images
from schemas.settings.index import IndexSettings
from stages.index.faiss_index import require_autofaiss
from stages.tables.committer import Committer, Deletion
from stages.tables.deletion import compact_table, delete_images, deleted_images
from stages.tables.ledger import read_ledger

_COMMAND = "arrag-db compact"
_KEEP_VERSIONS = datetime.timedelta(minutes=2)
"""Of tables that hold nothing of a picture, for those who just read them."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did."""

    images: int
    """How many pictures were deleted."""
    patches: int
    """How many patches were deleted, of all tables."""
    bytes_before: int
    """The size of the database on disk before, in bytes."""
    bytes_after: int
    """Its size now, in bytes."""
    indexes: tuple[str, ...]
    """The indexes that were built again."""

    def to_text(self) -> str:
        """One line for people."""
        built = f"; built again: {', '.join(self.indexes)}" if self.indexes else ""
        return (
            f"deleted {self.images:,} pictures with {self.patches:,} patches;"
            f" {self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB now{built}"
        )


def compact(
    database: str | Path, progress: Callable[[str], None] = lambda _step: None
) -> Compaction:
    """Compact a database: delete what is removed from its files, and merge small fragments.

    progress is told what is done next, before every step. Raises ArragError where the database is
    busy or there is none.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    before = stored_bytes(layout.root)
    if any(IndexManifest.read(folder).kind == "ivfpq" for folder in index_folders(layout)):
        # It will have to be built again.
        require_autofaiss()
    with lease(layout, _COMMAND) as held:
        committer = Committer(layout, manifest.keys, held.check)
        # From here on whatever the tables hold is complete.
        committer.recover(read_ledger(layout))
        whole = {folder for folder in index_folders(layout) if _holds_all(layout, folder)}
        hide_suppressed(database, _COMMAND)
        removed = Tombstones(layout).ids
        committer.begin_compaction(_deletions(layout, manifest, removed))
        patches = 0
        for keys in patch_tables(layout):
            held.check()
            progress(f"deleting from {keys.name}")
            patches += delete_images(layout.patches(keys), "patch_id", removed)
            progress(f"writing {keys.name} anew")
            compact_table(layout.patches(keys))
        held.check()
        progress("writing the images anew")
        images = delete_images(layout.images, "image_id", removed)
        compact_table(layout.images)
        for path in (layout.rejects, layout.ledger, layout.removed):
            if exists(path):
                compact_table(path, keep=_KEEP_VERSIONS)
        held.check()
        Committer(layout, manifest.keys, held.check).end_compaction()
    indexes = []
    for folder in index_folders(layout):
        if _is_outdated(layout, folder, removed):
            name = Path(folder).name
            progress(f"building index {name} again")
            made = IndexManifest.read(folder)
            if PatchTable(layout.patches(made.keys)).count:
                settings = IndexSettings.from_json(made.settings)
                index(layout.root, settings, name=name, compacted=folder in whole)
            else:
                delete_place(folder)
            indexes.append(name)
    return Compaction(images, patches, before, stored_bytes(layout.root), tuple(indexes))


def _deletions(layout: Layout, manifest: DatabaseManifest, removed: Ids) -> list[Deletion]:
    """What is to be deleted, by shard, without what the ledger has of an interrupted compaction."""
    recorded = deleted_images(layout)
    shards: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
    columns = ["image_id", "shard", "source", "split"]
    for batch in ImageTable(layout.images).batches(columns, 131_072):
        ids = batch.column("image_id").to_numpy()
        chosen = pa.array(contains(removed, ids) & ~contains(recorded, ids))
        for row in batch.filter(chosen).to_pylist():
            held_out = row["split"] == "heldout"
            shards[row["shard"], row["source"]].append((row["image_id"], held_out))
    return [
        Deletion(
            shard,
            source,
            tuple(image for image, _ in images),
            heldout=sum(held_out for _, held_out in images),
            patches=manifest.patches_per_image * sum(not held_out for _, held_out in images),
        )
        for (shard, source), images in sorted(shards.items())
    ]


def _is_outdated(layout: Layout, folder: str, removed: Ids) -> bool:
    """Whether an index holds something of these pictures, or names a deleted table version."""
    index = IndexManifest.read(folder)
    try:
        PatchTable(layout.patches(index.keys), index.table_version)
        return bool(indexed_images(layout, Path(folder).name, removed))
    except ArragError:
        return True


def _holds_all(layout: Layout, folder: str) -> bool:
    """Whether an index was made from all rows of its table, so that it only has to lose some."""
    index = IndexManifest.read(folder)
    table = PatchTable(layout.patches(index.keys))
    return (table.count, table.mark) == (index.settings["rows"], index.mark)
