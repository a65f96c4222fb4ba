"""Prove a database sound, or name what is not.

Counts are checked for every shard, ids over all rows; keys and next tokens are recomputed from the
grids for at least 64 pictures of every shard, or for all of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.patch_index import PatchIndex, index_folders
from schemas.errors import ArragError
from schemas.manifest import DatabaseManifest, IndexManifest, Layout, read_codebook
from schemas.tables import (
    POSITION_BITS,
    ROW_BITS,
    image_id_range,
    images_schema,
    list_values,
    patches_schema,
    shard_number,
    split_patch_ids,
)
from stages.extract_patches import extract_patches
from stages.patch_table import LedgerState, read_ledger

IMAGES_PER_SHARD = 64
SHOWN = 3
"""How many offenders a failed check names."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked. `detail` says what was seen, and for a failure where."""

    name: str
    ok: bool
    detail: str


def verify(
    database: Path,
    *,
    full: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Check]:
    """All checks of a database. Raises BadInputError where there is none."""
    layout = Layout(database.expanduser())
    manifest = DatabaseManifest.read(layout)
    state = read_ledger(layout)
    rows = lance.dataset(layout.ledger).to_table(filter="state = 'done'").to_pylist()
    patches = lance.dataset(layout.patches(manifest.keys))
    images = lance.dataset(layout.images)
    checks = [
        _codebook(layout, manifest),
        _schemas(manifest, images, patches),
        _ledger_once(rows),
        *_counts(layout, rows, images, patches),
        _unique("image ids unique", _ids(images, "image_id")),
        _unique("patch ids unique", _ids(patches, "patch_id")),
        _held_out(images, patches),
        _contents(manifest, state, images, patches, full, progress),
    ]
    return checks + [_index(layout, folder) for folder in index_folders(layout)]


def _codebook(layout: Layout, manifest: DatabaseManifest) -> Check:
    name = "codebook agrees with the manifest"
    try:
        codes = read_codebook(layout)
    except ArragError as error:
        return Check(name, False, str(error))
    wanted = (manifest.tokenizer.vocabulary, manifest.tokenizer.dimension)
    unit = bool(np.allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-4))
    return Check(name, codes.shape == wanted and unit, f"{codes.shape}, manifest {wanted}")


def _schemas(
    manifest: DatabaseManifest, images: lance.LanceDataset, patches: lance.LanceDataset
) -> Check:
    """The tables have the columns that the manifest's tokenizer and keys ask for."""
    spec, keys = manifest.tokenizer, manifest.keys
    wanted = {
        "images": (images.schema, images_schema(spec, latents=keys.space == "latent")),
        "patches": (patches.schema, patches_schema(spec, keys)),
    }
    wrong = [name for name, (held, schema) in wanted.items() if not held.equals(schema)]
    return Check("tables agree with the manifest", not wrong, _named(keys.name, wrong))


def _ledger_once(rows: list[dict[str, Any]]) -> Check:
    counts = Counter((row["shard"], row["attempt"]) for row in rows)
    twice = [shard for (shard, _), count in counts.items() if count > 1]
    return Check("every shard recorded once", not twice, _named(f"{len(rows)} rows", twice))


def _counts(
    layout: Layout,
    rows: list[dict[str, Any]],
    images: lance.LanceDataset,
    patches: lance.LanceDataset,
) -> Iterator[Check]:
    """The rows of each shard in each table against what its ledger row says."""
    shard_images = _per_shard(images)
    shard_rejects = _per_shard(lance.dataset(layout.rejects))
    shard_patches: Counter[int] = Counter()
    for ids in _ids(patches, "patch_id"):
        numbers, counts = np.unique(ids >> (ROW_BITS + POSITION_BITS), return_counts=True)
        shard_patches.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    totals: Counter[str] = Counter()
    ledger: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for field in ("inputs", "images", "patches", "rejects"):
            ledger[row["shard"]][field] += row[field]
            totals[field] += row[field]
    unbalanced = [s for s, c in ledger.items() if c["inputs"] != c["images"] + c["rejects"]]
    detail = "{inputs} inputs = {images} images + {rejects} rejects".format(**totals)
    yield Check("inputs = images + rejects", not unbalanced, _named(detail, unbalanced))
    numbered = {shard_number(shard): shard for shard in ledger}
    tables: tuple[tuple[str, Counter[Any], dict[Any, int]], ...] = (
        ("images", shard_images, {s: c["images"] for s, c in ledger.items()}),
        ("rejects", shard_rejects, {s: c["rejects"] for s, c in ledger.items()}),
        ("patches", shard_patches, {n: ledger[s]["patches"] for n, s in numbered.items()}),
    )
    for name, held, known in tables:
        wrong = [s for s in known.keys() | held.keys() if known.get(s, 0) != held.get(s, 0)]
        named = [f"{numbered.get(s, s)} has {held.get(s, 0)} of {known.get(s, 0)}" for s in wrong]
        yield Check(f"{name} per shard", not wrong, _named(f"{sum(held.values())} rows", named))


def _per_shard(table: lance.LanceDataset) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for batch in table.scanner(columns=["shard"]).to_batches():
        for entry in batch.column("shard").value_counts().to_pylist():
            counts[entry["values"]] += entry["counts"]
    return counts


def _ids(table: lance.LanceDataset, column: str) -> Iterator[npt.NDArray[np.int64]]:
    for batch in table.scanner(columns=[column], batch_size=1 << 20).to_batches():
        yield batch.column(column).to_numpy()


def _unique(name: str, blocks: Iterator[npt.NDArray[np.int64]]) -> Check:
    """No id twice. Ids of one shard stand together in a fragment, so ranges seldom overlap."""
    ids = np.concatenate([np.empty(0, np.int64), *blocks])
    ids.sort()
    twice = ids[1:][ids[1:] == ids[:-1]]
    return Check(name, not len(twice), _named(f"{len(ids)} ids", np.unique(twice).tolist()))


def _held_out(images: lance.LanceDataset, patches: lance.LanceDataset) -> Check:
    """No patch belongs to a held-out picture or to none."""
    table = images.to_table(columns=["image_id"], filter="split = 'database'")
    allowed = np.sort(table["image_id"].to_numpy())
    strays: set[int] = set()
    for ids in _ids(patches, "patch_id"):
        owners = np.unique(split_patch_ids(ids)[0])
        strays.update(owners[~np.isin(owners, allowed, assume_unique=True)].tolist())
    detail = f"{len(allowed)} pictures have patches"
    return Check("patches belong to pictures in the database", not strays, _named(detail, strays))


def _contents(
    manifest: DatabaseManifest,
    state: LedgerState,
    images: lance.LanceDataset,
    patches: lance.LanceDataset,
    full: bool,
    progress: Callable[[int, int], None],
) -> Check:
    """Keys and next tokens are what the grids say."""
    done = sorted(state.done)
    checked, wrong = 0, []
    for number, shard in enumerate(done, start=1):
        table = images.to_table(
            filter=f"shard = '{shard}' AND split = 'database'",
            limit=None if full else IMAGES_PER_SHARD,
        ).sort_by("image_id")
        checked += table.num_rows
        if table.num_rows and not _same_patches(manifest, shard, table, patches):
            wrong.append(shard)
        progress(number, len(done))
    detail = f"{checked} pictures of {len(done)} shards recomputed"
    return Check("keys and next tokens equal the grids", not wrong, _named(detail, wrong))


def _same_patches(
    manifest: DatabaseManifest, shard: str, table: pa.Table, patches: lance.LanceDataset
) -> bool:
    spec = manifest.tokenizer
    shape = (table.num_rows, spec.grid_height, spec.grid_width)
    latents = None
    if "latents" in table.column_names:
        latents = list_values(table["latents"]).reshape(*shape, spec.dimension)
    ids = table["image_id"].to_numpy()
    expected = extract_patches(
        spec, manifest.keys, ids, list_values(table["tokens"]).reshape(shape), latents
    )
    first, end = image_id_range(shard)
    low, high = first << POSITION_BITS, end << POSITION_BITS
    held = patches.to_table(filter=f"patch_id >= {low} AND patch_id < {high}").sort_by("patch_id")
    owners = split_patch_ids(held["patch_id"].to_numpy())[0]
    return bool(held.filter(pa.array(np.isin(owners, ids))).equals(expected))


def _index(layout: Layout, folder: Path) -> Check:
    """An index holds just the patches of the table version it names."""
    name = f"index {folder.name} matches its table"
    try:
        index = IndexManifest.read(folder)
        opened = PatchIndex.open(layout.root, folder.name)
        table = lance.dataset(layout.patches(index.keys))
        if table.version != index.table_version:
            try:
                table = table.checkout_version(index.table_version)
            except (OSError, ValueError):
                return Check(
                    name, False, f"table version {index.table_version} is gone; index again"
                )
    except ArragError as error:
        return Check(name, False, str(error))
    start = 0
    for batch in table.scanner(columns=["patch_id", "next_token"], scan_in_order=True).to_batches():
        ids, tokens = opened.entries(start, batch.num_rows)
        same = np.array_equal(ids, batch.column("patch_id").to_numpy()) and np.array_equal(
            tokens, batch.column("next_token").to_numpy()
        )
        if not same:
            return Check(name, False, f"entries {start}..{start + batch.num_rows} differ")
        start += batch.num_rows
    detail = f"{opened.count} entries, table version {index.table_version} has {start} rows"
    return Check(name, start == opened.count, detail)


def _named(detail: str, offenders: Any) -> str:
    """The detail and, for a failure, the first offenders."""
    listed = sorted(map(str, offenders))
    if not listed:
        return detail
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{detail}; wrong: {', '.join(listed[:SHOWN])}{more}"
