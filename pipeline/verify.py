"""Prove a database sound, or name what is not; and prove that nothing removed can be retrieved.

Counts are checked for every shard, ids over all rows; keys and next tokens are recomputed from the
grids for at least 64 pictures of every shard, or for all of them. A removed picture may be in
tables and indexes as long as a tombstone hides it, until a compaction deletes it; a search with its
own keys must never return anything of it. From top to bottom: `verify` and its checks in their
order, then `verify_removed`, the proof of a receipt, and its checks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.errors import ArragError, IncompatibleError
from arrag_runtime.format.ids import (
    POSITION_BITS,
    ROW_BITS,
    Ids,
    contains,
    shard_number,
    split_patch_ids,
)
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.location import local_folder
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout, read_codebook
from arrag_runtime.format.patches import PatchBlock, PatchTable, patch_tables
from arrag_runtime.search.patch_index import PatchIndex, index_folders
from arrag_runtime.search.tombstones import Tombstones
from pipeline.building.plan_shards import open_rejects
from schemas.receipt import Receipt
from schemas.tables import images_schema, is_held_out, patches_schema
from stages.encode.extract_patches import extract_patches
from stages.index.index_contents import checksum, index_contents, left_out
from stages.removal.find_images import Selection, find_images
from stages.removal.suppression import read_suppressions
from stages.tables.deletion import deleted_images
from stages.tables.ledger import read_ledger

_SHOWN = 3
"""So many offenders a failed check names."""
_BLOCK = 1 << 20
"""So many rows are read at once."""
_IMAGES_PER_SHARD = 64
"""So many pictures of each shard have their patches recomputed, unless all have."""
_SEARCHED = 64
"""So many removed pictures' own keys are searched for in every index."""
_NEIGHBORS = 100
"""An own key lies at distance 0; hardly a picture shares all of its keys with a hundred others."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    """What should hold."""
    ok: bool
    """Whether it does."""
    detail: str
    """What was seen, and for a failure where."""


def verify(
    database: str | Path,
    *,
    full: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Check]:
    """All checks of a database; it is sound when all are ok.

        wrong = [check for check in verify("mydb") if not check.ok]

    full: recompute the patches of all pictures, and not of some per shard. progress is told how
    many shards of how many are done. Raises BadInputError where there is no database.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    try:
        tables = _Tables(layout, manifest)
        checks = [
            _codebook(layout, manifest),
            _schemas(tables),
            *_counts(tables),
            *_removals(layout),
            _unique("image ids unique", tables.images, "image_id"),
            _unique("patch ids unique", tables.patches, "patch_id"),
            _splits(tables),
            _owners(tables),
            _contents(tables, full, progress),
        ]
    except (OSError, ValueError, pa.ArrowException) as error:
        # A table or one of its files is missing or damaged; the first line names it.
        return [Check("tables can be read", False, str(error).splitlines()[0])]
    return checks + [_index(layout, folder) for folder in index_folders(layout)]


def _check(name: str, detail: str, offenders: Iterable[object]) -> Check:
    """It holds where there are no offenders; the first of them are named."""
    listed = sorted(map(str, offenders))
    if listed:
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        detail += f"; wrong: {', '.join(listed[:_SHOWN])}{more}"
    return Check(name, not listed, detail)


class _Tables:
    """The tables of a database, and which fragments hold which shards, by the shards' numbers."""

    def __init__(self, layout: Layout, manifest: DatabaseManifest) -> None:
        self.manifest = manifest
        self.images = lance.dataset(layout.images)
        self.patches = lance.dataset(layout.patches(manifest.keys))
        self.rejects = lance.dataset(layout.rejects).to_table(columns=["shard", "attempt"])
        self.open_rejects = open_rejects(layout.rejects, read_ledger(layout))
        ledger = lance.dataset(layout.ledger)
        self.done = ledger.to_table(filter="state = 'done'").to_pylist()
        self.deletions = ledger.to_table(filter="state = 'removed'").to_pylist()
        shift = ROW_BITS + POSITION_BITS
        self.patch_counts, self.patch_fragments = _by_shard(self.patches, "patch_id", shift)
        self.image_counts, self.image_fragments = _by_shard(self.images, "image_id", ROW_BITS)


def _by_shard(
    table: lance.LanceDataset, column: str, shift: int
) -> tuple[Counter[int], dict[int, list[Any]]]:
    """How many rows each shard has, and in which fragments, by the shard's number."""
    counts: Counter[int] = Counter()
    fragments: dict[int, list[Any]] = defaultdict(list)
    for fragment in table.get_fragments():
        ids = fragment.to_table(columns=[column])[column].to_numpy()
        numbers, rows = np.unique(ids >> shift, return_counts=True)
        for number, count in zip(numbers.tolist(), rows.tolist(), strict=True):
            counts[number] += count
            fragments[number].append(fragment)
    return counts, fragments


def _codebook(layout: Layout, manifest: DatabaseManifest) -> Check:
    name = "codebook agrees with the manifest"
    try:
        codes = read_codebook(layout)
    except ArragError as error:
        return Check(name, False, str(error))
    wanted = (manifest.tokenizer.vocabulary, manifest.tokenizer.dimension)
    unit = bool(np.allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-4))
    return Check(name, codes.shape == wanted and unit, f"{codes.shape}, manifest {wanted}")


def _schemas(tables: _Tables) -> Check:
    """The tables have the columns that the manifest's tokenizer and keys ask for."""
    spec, keys = tables.manifest.tokenizer, tables.manifest.keys
    wanted = {
        "images": (tables.images.schema, images_schema(spec, latents=keys.space == "latent")),
        "patches": (tables.patches.schema, patches_schema(spec, keys)),
    }
    wrong = [name for name, (held, schema) in wanted.items() if not held.equals(schema)]
    return _check("tables agree with the manifest", keys.name, wrong)


def _counts(tables: _Tables) -> Iterator[Check]:
    """The rows of each shard in each table against what its ledger row says."""
    attempts = Counter((row["shard"], row["attempt"]) for row in tables.done)
    twice = [shard for (shard, _), count in attempts.items() if count > 1]
    yield _check("every shard recorded once", f"{len(tables.done)} rows", twice)
    ledger: dict[int, Counter[str]] = defaultdict(Counter)
    names: dict[int, str] = {}
    counted = ("images", "patches")
    for row in tables.done:
        number = shard_number(row["shard"])
        names[number] = row["shard"]
        ledger[number].update({name: row[name] for name in (*counted, "inputs", "rejects")})
    for row in tables.deletions:
        number = shard_number(row["shard"])
        ledger[number].update({name: row[name] for name in counted} | {"removed": -row["images"]})
    totals: Counter[str] = Counter()
    for counts in ledger.values():
        totals.update(counts)
    unbalanced = [
        names[number]
        for number, c in ledger.items()
        if c["inputs"] != c["images"] + c["rejects"] + c["removed"]
    ]
    detail = "{inputs} inputs = {images} images + {rejects} rejects".format_map(totals)
    if totals["removed"]:
        detail += f" + {totals['removed']} removed"
    yield _check("inputs = images + rejects", detail, unbalanced)
    yield _rejects_kept(tables)
    rejects = Counter(map(shard_number, tables.open_rejects["shard"].to_pylist()))
    held_by_table = {
        "images": tables.image_counts,
        "rejects": rejects,
        "patches": tables.patch_counts,
    }
    for name, held in held_by_table.items():
        wrong = []
        for number in sorted(ledger.keys() | held.keys()):
            if number not in ledger:
                wrong.append(f"{held[number]} rows of a shard that is not done (build again)")
            elif held[number] != (known := ledger[number][name]):
                wrong.append(f"{names[number]} has {held[number]} of {known}")
        yield _check(f"{name} per shard", f"{held.total()} rows", wrong)


def _rejects_kept(tables: _Tables) -> Check:
    """Every attempt's rejects are still there, also those that a later attempt took."""
    held = Counter(zip(*(column.to_pylist() for column in tables.rejects.columns), strict=True))
    known = {
        (row["shard"], row["attempt"]): row["rejects"] + len(row["members"] or ())
        for row in tables.done
    }
    wrong = [
        f"attempt {entry[1]} of {entry[0]} has {held[entry]} of {known.get(entry, 0)}"
        for entry in held.keys() | known.keys()
        if held[entry] != known.get(entry, 0)
    ]
    return _check("rejects of every attempt", f"{held.total()} rows", wrong)


def _removals(layout: Layout) -> Iterator[Check]:
    """What the list of removed pictures names is hidden, and deleted where the ledger says so."""
    suppressions = read_suppressions(layout)
    hidden = Tombstones(layout).ids
    if not suppressions and not len(hidden):
        return
    images = ImageTable(layout.images)
    listed = Selection(hashes=suppressions.hashes, urls=suppressions.urls)
    seen = find_images(images, listed, hidden, with_copies=False).matched["key"].to_pylist()
    detail = f"{len(hidden)} pictures, {len(suppressions.hashes)} hashes on the list"
    yield _check("removed pictures are hidden", detail, seen)
    deleted = deleted_images(layout)
    left = _stored(images, deleted)
    detail = f"{len(deleted)} pictures deleted"
    if left:
        detail += "; a compaction was interrupted, run `arrag-db compact` again"
    yield _check("deleted pictures are out of the tables", detail, left)


def _unique(name: str, table: lance.LanceDataset, column: str) -> Check:
    """No id twice: none within a fragment, nor between fragments whose ranges overlap.

    A shard's ids form a range of their own, so seldom more than one fragment is looked at.
    """
    twice: set[int] = set()
    total, reach, open_ids = 0, -1, np.empty(0, np.int64)
    ranges = []
    for fragment in table.get_fragments():
        ids = fragment.to_table(columns=[column])[column].to_numpy()
        if len(ids):
            ranges.append((int(ids.min()), int(ids.max()), fragment))
    for low, high, fragment in sorted(ranges, key=lambda entry: entry[:2]):
        ids = fragment.to_table(columns=[column])[column].to_numpy()
        total += len(ids)
        open_ids = np.concatenate([open_ids, ids]) if low <= reach else ids.copy()
        open_ids.sort()
        twice.update(open_ids[1:][open_ids[1:] == open_ids[:-1]].tolist())
        reach = max(reach, high)
    return _check(name, f"{total} ids", twice)


def _splits(tables: _Tables) -> Check:
    """Which pictures are held out is what their hashes say."""
    share = tables.manifest.hold_out
    wrong, held = [], 0
    for batch in tables.images.scanner(columns=["key", "sha256", "split"]).to_batches():
        for row in batch.to_pylist():
            held_out = is_held_out(row["sha256"], share)
            held += held_out
            if (row["split"] == "heldout") != held_out:
                wrong.append(row["key"])
    return _check("held-out pictures are those of the hash", f"{held} held", wrong)


def _owners(tables: _Tables) -> Check:
    """No patch belongs to a held-out picture or to none."""
    table = tables.images.to_table(columns=["image_id"], filter="split = 'database'")
    allowed = np.sort(table["image_id"].to_numpy())
    strays: set[int] = set()
    for batch in tables.patches.scanner(columns=["patch_id"], batch_size=1 << 20).to_batches():
        owners = np.unique(split_patch_ids(batch.column("patch_id").to_numpy())[0])
        strays.update(owners[~np.isin(owners, allowed, assume_unique=True)].tolist())
    detail = f"{len(allowed)} pictures have patches"
    return _check("patches belong to pictures in the database", detail, strays)


def _contents(tables: _Tables, full: bool, progress: Callable[[int, int], None]) -> Check:
    """Keys and next tokens are what the grids say."""
    shards = sorted({row["shard"] for row in tables.done})
    checked, wrong = 0, []
    for done, shard in enumerate(shards, start=1):
        number = shard_number(shard)
        if number in tables.image_fragments:
            images = tables.images.scanner(
                fragments=tables.image_fragments[number],
                filter=f"shard = '{shard}' AND split = 'database'",
                limit=None if full else _IMAGES_PER_SHARD,
            ).to_table()
            checked += images.num_rows
            if images.num_rows and not _same_patches(tables, number, images.sort_by("image_id")):
                wrong.append(shard)
        progress(done, len(shards))
    detail = f"{checked} pictures of {len(shards)} shards recomputed"
    return _check("keys and next tokens equal the grids", detail, wrong)


def _same_patches(tables: _Tables, number: int, images: pa.Table) -> bool:
    spec = tables.manifest.tokenizer
    shape = (images.num_rows, spec.grid_height, spec.grid_width)
    latents = None
    if "latents" in images.column_names:
        latents = list_values(images["latents"]).reshape(*shape, spec.dimension)
    ids = images["image_id"].to_numpy()
    tokens = list_values(images["tokens"]).reshape(shape)
    expected = extract_patches(spec, tables.manifest.keys, ids, tokens, latents)
    if number not in tables.patch_fragments:
        return not len(expected)
    held = tables.patches.scanner(fragments=tables.patch_fragments[number]).to_table()
    owners = split_patch_ids(held["patch_id"].to_numpy())[0]
    held = held.filter(pa.array(np.isin(owners, ids))).sort_by("patch_id")
    same: bool = held.equals(expected)
    return same


def _index(layout: Layout, folder: str) -> Check:
    """An index holds just the patches of the table version it names, less what it leaves out."""
    short = folder.rpartition("/")[2]
    name = f"index {short} matches its table"
    try:
        index = IndexManifest.read(folder)
        PatchIndex.open(layout.root, short)
        table = PatchTable(layout.patches(index.keys), index.table_version)
        local = local_folder(folder)
        hidden = np.union1d(left_out(local), Tombstones(layout).ids)
        whole = index.kind == "codebook"
        contents = index_contents(local, index, read_codebook(layout))
        held, found = checksum(contents, hidden, keys=whole)
        rows, wanted = checksum(table.blocks(), hidden, keys=whole)
    except ArragError as error:
        return Check(name, False, str(error))
    detail = f"{held} keys, table version {index.table_version} has {rows}"
    if found != wanted and held == rows:
        detail += ", and they differ"
    return Check(name, found == wanted and held == rows, detail)


def verify_removed(database: str | Path, receipt: str) -> list[Check]:
    """Whether nothing of a receipt's pictures can be retrieved: it holds when all checks are ok.

    receipt: its id, or its file. Raises BadInputError where there is no such receipt.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    said = Receipt.read(layout, receipt)
    removed = np.array(said.image_ids, np.int64)
    tombstones = Tombstones(layout)
    seen = removed[~tombstones.hides(removed)]
    images = ImageTable(layout.images)
    stored = _stored(images, removed)
    detail = f"{len(removed)} pictures of receipt {said.id}, {len(removed) - len(seen)} on the list"
    checks = [
        _check("every picture is on the list of removed ones", detail, seen),
        _not_shown("images", stored, tombstones),
    ]
    for keys in patch_tables(layout):
        held = _owning(PatchTable(layout.patches(keys)).blocks(_BLOCK), removed)
        checks.append(_not_shown(f"patches {keys.name}", held, tombstones))
    # Up to `_SEARCHED` of them, evenly over all.
    at = np.linspace(0, len(stored) - 1, min(len(stored), _SEARCHED)).round().astype(np.int64)
    asked = np.array(sorted(stored), np.int64)[at]
    grids = list(images.grids(asked.tolist(), manifest.tokenizer.grid_height).values())
    for name in (Path(folder).name for folder in index_folders(layout)):
        try:
            held = indexed_images(layout, name, removed)
            checks.append(_not_shown(f"index {name}", held, tombstones))
            checks.append(_searched(PatchIndex.open(layout.root, name), grids, removed))
        except ArragError as error:
            checks.append(Check(f"index {name} can be opened", False, str(error)))
    return checks


def indexed_images(layout: Layout, name: str, asked: Ids) -> set[int]:
    """Those of the pictures asked about (sorted ids) of which an index holds entries or copies.

    Raises ArragError where it is damaged.
    """
    manifest = IndexManifest.read(layout.index(name))
    folder = local_folder(layout.index(name))
    try:
        blocks = index_contents(folder, manifest, read_codebook(layout))
        return _owning(blocks, asked)
    except (OSError, ValueError) as error:
        raise IncompatibleError(
            f"index {name} in {folder} is damaged or incomplete; index again"
        ) from error


def _among(blocks: Iterable[Ids], asked: Ids) -> set[int]:
    """Those of the pictures asked about that are in these blocks of image ids."""
    found: set[int] = set()
    for ids in blocks:
        found.update(np.unique(ids[contains(asked, ids)]).tolist())
    return found


def _stored(images: ImageTable, asked: Ids) -> set[int]:
    """Those of the pictures asked about that the images table has rows of."""
    batches = images.batches(["image_id"], _BLOCK)
    return _among((batch.column("image_id").to_numpy() for batch in batches), asked)


def _owning(blocks: Iterable[PatchBlock], asked: Ids) -> set[int]:
    """Those of the pictures asked about that own one of these patches."""
    return _among((split_patch_ids(np.asarray(b.patch_ids))[0] for b in blocks), asked)


def _not_shown(where: str, held: set[int], tombstones: Tombstones) -> Check:
    """Nothing of these pictures is there, or what is there is hidden."""
    ids = np.array(sorted(held), np.int64)
    detail = "holds nothing of them"
    if len(ids):
        detail = f"holds {len(ids)} of them, hidden; `arrag-db compact` deletes them"
    return _check(f"{where} cannot show them", detail, ids[~tombstones.hides(ids)])


def _searched(opened: PatchIndex, grids: list[npt.NDArray[np.uint16]], removed: Ids) -> Check:
    """A search with the pictures' own keys returns nothing of them."""
    name = f"a search of index {opened.manifest.name} returns none of them"
    if not grids:
        return Check(name, True, "no grids left to ask with, since they were deleted")
    keys = opened.manifest.keys.neighborhood.keys(np.stack(grids))
    found = opened.search(keys.reshape(-1, keys.shape[-1]), _NEIGHBORS)
    returned = _among([split_patch_ids(found.patch_ids[found.patch_ids >= 0])[0]], removed)
    detail = f"asked with {keys.shape[0] * keys.shape[1]} keys of {len(grids)} of the pictures"
    return _check(name, detail, returned)
