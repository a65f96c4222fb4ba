"""Prove that what was removed cannot be retrieved, or name where it still can.

A picture of a receipt may be in tables and indexes as long as the list of removed pictures hides it,
until a compaction takes it out; a search with its own keys must never return anything of it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arrag_runtime.patch_index import PatchIndex, index_folders
from arrag_runtime.removed import Tombstones
from pipeline.checks import Check, named
from schemas.errors import ArragError, IncompatibleError
from schemas.location import local_folder
from schemas.manifest import DatabaseManifest, IndexManifest, Layout, read_codebook
from schemas.receipt import Receipt
from schemas.tables import Ids, contains, split_patch_ids
from stages.find_images import Selection, find_images
from stages.index_contents import index_contents
from stages.read_images import ImageTable
from stages.read_patches import PatchTable, patch_tables
from stages.suppress import read_suppressed
from stages.take_out import booked_removals

BLOCK = 1 << 20
SEARCHED = 64
"""So many pictures' own keys are searched for in every index."""
NEIGHBORS = 100
"""An own key lies at distance 0; hardly a picture shares all of its keys with a hundred others."""


def removed_checks(layout: Layout) -> Iterator[Check]:
    """For `verify`: what the list names is hidden, and gone where the ledger says so."""
    suppressed = read_suppressed(layout)
    hidden = Tombstones(layout).ids
    if not suppressed and not len(hidden):
        return
    images = ImageTable(layout.images)
    wanted = Selection(hashes=suppressed.hashes, urls=suppressed.urls)
    seen = find_images(images, wanted, hidden, with_copies=False).matched["key"].to_pylist()
    detail = f"{len(hidden)} pictures, {len(suppressed.hashes)} hashes on the list"
    yield Check("removed pictures are hidden", not seen, named(detail, seen))
    booked = booked_removals(layout)
    left = [
        image
        for batch in images.batches(["image_id"], BLOCK)
        for image in _among(booked, batch.column("image_id").to_numpy())
    ]
    detail = f"{len(booked)} pictures compacted away"
    if left:
        detail += "; a compaction was interrupted, run `arrag-db compact` again"
    yield Check("compacted pictures are out of the tables", not left, named(detail, left))


def verify_removed(database: str | Path, receipt: str) -> list[Check]:
    """Whether nothing of a receipt's pictures can be retrieved. receipt: an id, or a file.

    Raises BadInputError where there is no such receipt.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    said = Receipt.read(layout, receipt)
    gone = np.array(said.image_ids, np.int64)
    hidden = Tombstones(layout)
    seen = gone[~hidden.hides(gone)]
    images = ImageTable(layout.images)
    listed = f"{len(gone)} pictures of receipt {said.id}, {len(gone) - len(seen)} on the list"
    checks = [
        Check("every picture is on the list of removed ones", not len(seen), named(listed, seen)),
        _absent("images", _images(images, gone), hidden),
    ]
    for keys in patch_tables(layout):
        blocks = (block.patch_ids for block in PatchTable(layout.patches(keys)).blocks(BLOCK))
        checks.append(_absent(f"patches {keys.name}", _owners(blocks, gone), hidden))
    grids = images.grids(
        _spread(np.array(list(_images(images, gone)), np.int64)).tolist(),
        manifest.tokenizer.grid_height,
    )
    for name in (Path(folder).name for folder in index_folders(layout)):
        try:
            checks.append(_absent(f"index {name}", index_owners(layout, name, gone), hidden))
            checks.append(_searched(PatchIndex.open(layout.root, name), list(grids.values()), gone))
        except ArragError as error:
            checks.append(Check(f"index {name} can be opened", False, str(error)))
    return checks


def _absent(where: str, found: set[int], hidden: Tombstones) -> Check:
    """Nothing of these pictures is there, or what is there is hidden."""
    ids = np.array(sorted(found), np.int64)
    seen = ids[~hidden.hides(ids)]
    detail = "holds nothing of them"
    if len(ids):
        detail = f"holds {len(ids)} of them, hidden; `arrag-db compact` takes them out"
    return Check(f"{where} cannot show them", not len(seen), named(detail, seen))


def _images(images: ImageTable, gone: Ids) -> set[int]:
    found: set[int] = set()
    for batch in images.batches(["image_id"], BLOCK):
        found.update(_among(gone, batch.column("image_id").to_numpy()))
    return found


def index_owners(layout: Layout, name: str, gone: Ids) -> set[int]:
    """Those of the pictures that an index holds entries of, as copies of others, too.

    Raises ArragError where it is damaged.
    """
    manifest = IndexManifest.read(layout.index(name))
    folder = local_folder(layout.index(name))
    try:
        blocks = index_contents(folder, manifest, read_codebook(layout))
        return _owners((block.patch_ids for block in blocks), gone)
    except (OSError, ValueError) as error:
        raise IncompatibleError(
            f"index {name} in {folder} is damaged or incomplete; index again"
        ) from error


def _owners(blocks: Iterator[Ids], gone: Ids) -> set[int]:
    """Those of the pictures that own one of these patches."""
    found: set[int] = set()
    for patch_ids in blocks:
        found.update(_among(gone, split_patch_ids(np.asarray(patch_ids))[0]))
    return found


def _among(ids: Ids, wanted: Ids) -> list[int]:
    """Those of `wanted` that are among `ids`, once each."""
    among: list[int] = np.unique(wanted[contains(ids, wanted)]).tolist()
    return among


def _spread(ids: Ids) -> Ids:
    """Up to `SEARCHED` of these ids, evenly over all of them."""
    ordered = np.sort(ids)
    if len(ordered) <= SEARCHED:
        return ordered
    return ordered[np.linspace(0, len(ordered) - 1, SEARCHED).astype(np.int64)]


def _searched(opened: PatchIndex, grids: list[npt.NDArray[np.uint16]], gone: Ids) -> Check:
    """A search with the pictures' own keys returns nothing of them."""
    name = f"a search of index {opened.manifest.name} returns none of them"
    if not grids:
        return Check(name, True, "no grids left to ask with, since they were compacted away")
    keys = opened.manifest.keys.neighborhood.keys(np.stack(grids))
    found = opened.search(keys.reshape(-1, keys.shape[-1]), NEIGHBORS)
    returned = _among(gone, split_patch_ids(found.patch_ids[found.patch_ids >= 0])[0])
    detail = f"asked with {keys.shape[0] * keys.shape[1]} keys of {len(grids)} of the pictures"
    return Check(name, not returned, named(detail, returned))
