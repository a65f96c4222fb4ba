"""Deletion, and the list of removed pictures: what removals write with Lance.

The list (`removed.lance`) is only appended to and needs no lease: Lance's own commits keep the rows
of several writers. Everything else here changes tables that builds write, under their lease.
"""

import contextlib
import datetime
import os
import secrets
import shutil
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from arrag_runtime.format.ids import POSITION_BITS, Ids, contains
from arrag_runtime.format.location import exists, in_store
from arrag_runtime.format.manifest import Layout
from schemas.tables import REMOVED_SCHEMA

_KEEP_NOTHING = datetime.timedelta(0)


def append_removed(layout: Layout, rows: pa.Table) -> int:
    """Add rows of `REMOVED_SCHEMA` to the list; returns its version. Needs no lease."""
    create_removed_list(layout)
    return int(lance.write_dataset(rows, layout.removed, mode="append").version)


def create_removed_list(layout: Layout) -> None:
    """Make the empty list where there is none, once, however many processes try it at a time.

    Lance creates a table by overwriting, which drops what another process has just added to it. A
    folder that is renamed to its place cannot take that of another. In a bucket nothing can be
    renamed, so there a database is created with its list.
    """
    if exists(layout.removed):
        return
    if in_store(layout.removed):
        lance.write_dataset(REMOVED_SCHEMA.empty_table(), layout.removed, mode="create")
        return
    draft = Path(layout.root) / f".removed-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        lance.write_dataset(REMOVED_SCHEMA.empty_table(), draft, mode="create")
        with contextlib.suppress(OSError):
            draft.rename(layout.removed)
        if not exists(layout.removed):
            raise OSError(f"cannot make {layout.removed}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def deleted_images(layout: Layout) -> Ids:
    """The ids of the pictures whose deletion the ledger records, sorted."""
    ledger = lance.dataset(layout.ledger)
    rows = ledger.to_table(columns=["members"], filter="state = 'removed'")["members"]
    return np.unique(np.array([int(i) for members in rows.to_pylist() for i in members], np.int64))


def delete_images(path: str, column: str, images: Ids) -> int:
    """Delete the rows of these pictures (sorted ids) from a table; returns how many there were.

    column: "image_id", or "patch_id" for a patches table. One fragment is scanned after the other,
    ids only, and all deletions become one commit.
    """
    table = lance.dataset(path)
    shift = POSITION_BITS if column == "patch_id" else 0
    changed, emptied, deleted = [], [], 0
    for fragment in table.get_fragments():
        rows = fragment.scanner(columns=[column], with_row_address=True).to_table()
        hit = contains(images, rows[column].to_numpy() >> shift)
        if not hit.any():
            continue
        deleted += int(np.count_nonzero(hit))
        # The lower half of an address is the row's place in its fragment, deleted ones counted.
        left = fragment.delete_rows((rows["_rowaddr"].to_numpy()[hit] & 0xFFFFFFFF).tolist())
        if left is None:
            emptied.append(fragment.fragment_id)
        else:
            changed.append(left)
    if deleted:
        operation = lance.LanceOperation.Delete(changed, emptied, "removed pictures")
        lance.LanceDataset.commit(table, operation, read_version=table.version)
    return deleted


def compact_table(path: str, *, keep: datetime.timedelta = _KEEP_NOTHING) -> None:
    """Merge small fragments, write those with deleted rows anew, delete versions older than `keep`.

    With nothing kept, everything but the newest version leaves the disk, files of killed writers
    too: nobody else may write the table then.
    """
    lance.dataset(path).optimize.compact_files(materialize_deletions_threshold=0.0)
    lance.dataset(path).cleanup_old_versions(older_than=keep, delete_unverified=not keep)
