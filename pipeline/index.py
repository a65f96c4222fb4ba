"""Index a database: build in a folder of its own, measure it against exact search, put it in place.

A killed build of a codebook index goes on with the first step that is missing; one of another kind
starts again. An index that is in place is never changed: a grown one is a new folder that shares the
old one's files, so whoever searches the old one goes on doing so.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from arrag_runtime.codebook_search import CodebookSearch
from arrag_runtime.patch_index import PatchIndex, index_folders, newest_index, open_engine
from arrag_runtime.removed import Tombstones
from pipeline.exact import exact_neighbors
from pipeline.index_steps import (
    Progress,
    copies_left_aside,
    fill_lists,
    link_files,
    merge_into,
)
from pipeline.lease import lease
from pipeline.ray_run import RayResources
from schemas.codes import CodeLayout
from schemas.errors import ArragError, BadInputError
from schemas.index_settings import IndexSettings, size_in_bytes
from schemas.inverted_lists import CENTROIDS, GRAPH, ListPart
from schemas.location import building_folder, finish_replacements, local_folder, put_folder
from schemas.manifest import (
    INDEX_FILE,
    LEFT_OUT_FILE,
    DatabaseManifest,
    IndexManifest,
    Layout,
    read_codebook,
    read_json,
    write_json,
)
from schemas.specs import Floats
from schemas.tables import Ids
from stages.build_index import train_and_fill
from stages.certificate import Target, certify
from stages.exact_search import Queries, true_distances
from stages.fit_weights import FittedWeights, WeightSettings, fit_weights
from stages.index_contents import left_out
from stages.patch_table import Committer, read_ledger
from stages.read_images import ImageTable, duplicate_images
from stages.read_patches import PatchTable
from stages.sample_queries import sample_queries

QUERY_PICTURES, QUERIES = 100, 1000
DEEPEST = 2048
MOST_PARTS = 8
"""A search pays for every part; when there would be more, they are merged."""
OUTGROWN = 4
"""With this many times the keys that its lists were trained for, an index is built anew."""


@dataclass(frozen=True)
class _Job:
    """What there is to index and how."""

    layout: Layout
    manifest: DatabaseManifest
    settings: IndexSettings
    table: PatchTable
    codes: Floats
    work: Path
    resources: RayResources | None
    progress: Progress


def index_database(
    database: str | Path,
    settings: IndexSettings,
    *,
    name: str | None = None,
    min_recall: float | None = None,
    compacted: bool = False,
    resources: RayResources | None = None,
    progress: Progress = lambda _step, _done, _total: None,
    announce: Callable[[str], None] = lambda _cost: None,
) -> IndexManifest:
    """Build an index over the database's patches, or bring the one of this name up to date.

    name: by default the index's kind. min_recall: below this recall at the target's k the index is
    not put in place. compacted: the table was just compacted, so an index that held all of its rows
    only has to lose those that are gone. resources: the Ray cluster to fill and measure on; by default this process does
    it unless the table is large. Raises ArragError for what the user can mend.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise BadInputError(
            f"--name '{name}' is no name for a folder; use letters, digits, - and _"
        )
    Target.parse(settings.target_recall)
    with lease(layout, "arrag-db index"):
        started = time.perf_counter()
        # Rows of shards that a killed build left unfinished must not be indexed.
        Committer(layout, manifest.keys).recover(read_ledger(layout))
        table = PatchTable(layout.patches(manifest.keys))
        settings = settings.resolved(manifest.keys, table.count)
        name = name or str(settings.kind)
        finish_replacements(layout.indexes)
        codes = read_codebook(layout)
        older = _older(layout, name, settings, table, compacted)
        work = _work_folder(layout, name, settings, table, older)
        job = _Job(layout, manifest, settings, table, codes, work, resources, progress)
        _note_left_out(job)
        built = _build_codebook(job, older) if settings.kind == "codebook" else _build_faiss(job)
        built = replace(built, name=name)
        seconds = time.perf_counter() - started
        final = _certified(job, built, seconds, announce)
        reached = final.certificate["chosen"]["recall"][str(Target.parse(settings.target_recall).k)]
        if min_recall is not None and reached < min_recall:
            shutil.rmtree(work)
            raise BadInputError(
                f"index {name} has a recall of {reached:.3f}, below --min-recall {min_recall}, so it was"
                " not put in place; give more --nprobe or another --kind"
            )
        final.write(work)
        _put(layout.index(name), work)
        return final


def _build_codebook(job: _Job, older: IndexManifest | None) -> IndexManifest:
    """The parts of a codebook index in the work folder, and a manifest without measurements."""
    work, settings, table = job.work, job.settings, job.table
    weights, fitted = _weights(job, older)
    layout = CodeLayout(job.manifest.keys, job.codes, weights)
    _require_memory(job, table.count * (layout.size + 2))
    unwanted = work / LEFT_OUT_FILE
    unwanted_file = unwanted if unwanted.exists() else None
    parts: list[str] = []
    rewritten = older is not None and not _still_stands(older, table)
    if older is not None:
        parts = list(older.parts)
        link_files(local_folder(job.layout.index(older.name)), work, [CENTROIDS, GRAPH, *parts])
    if older is None or (table.mark > older.mark and not rewritten):
        name = f"part-{len(parts):04}"
        fill_lists(
            *(table, layout, settings, work),
            name=name,
            after=-1 if older is None else older.mark,
            left_out=unwanted_file,
            resources=job.resources,
            progress=job.progress,
        )
        parts.append(name)
    if rewritten or len(parts) > MOST_PARTS:
        folders = tuple(str(work / part) for part in parts)
        merged = f"part-{len(parts):04}"
        merge_into(
            *(work, folders, merged, layout, settings),
            *(unwanted_file, job.resources, job.progress),
        )
        for folder in folders:
            shutil.rmtree(folder)
        parts = [merged]
    opened = [ListPart.open(work / part, layout.size) for part in parts]
    lists = len(np.load(work / CENTROIDS, mmap_mode="r"))
    entries = sum(part.entries for part in opened)
    count = sum(part.keys for part in opened)
    if rewritten and count != table.count_without(left_out(work)):
        # It did not hold all rows of the table, so what it lacks is not known.
        shutil.rmtree(work)
        work.mkdir()
        _note_left_out(job)
        return _build_codebook(job, None)
    resident = entries * (layout.size + 2)
    return IndexManifest(
        name=settings.kind or "",
        kind="codebook",
        index_key=f"IVF{lists},PQ{layout.keys.neighborhood.size}x{layout.bits} (the codebook)",
        keys=job.manifest.keys,
        table_version=table.version,
        mark=table.mark,
        count=count,
        entries=entries,
        nprobe=settings.nprobe,
        code_bytes_per_key=entries * layout.size / max(count, 1),
        resident_bytes_per_key=resident / max(count, 1),
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
        left_out=left_out(job.work).size,
        parts=tuple(parts),
        weights=weights,
        temperature=None if fitted is None else fitted["temperature"],
        settings=settings.to_json()
        | {"rows": table.count, "trained_for": _trained_for(older, table)}
        | _per_picture(job),
        metrics={} if fitted is None else {"weights": fitted},
    )


def _trained_for(older: IndexManifest | None, table: PatchTable) -> int:
    return table.count if older is None else int(older.settings["trained_for"])


def _per_picture(job: _Job) -> dict[str, int]:
    spec = job.manifest.tokenizer
    hood = job.manifest.keys.neighborhood
    return {"patches_per_image": hood.positions(spec.grid_height, spec.grid_width).size}


def _build_faiss(job: _Job) -> IndexManifest:
    """A flat or ivfpq index in the work folder, and a manifest without measurements."""
    settings = job.settings
    filled = train_and_fill(
        *(job.table, job.codes, job.work, settings, left_out(job.work)),
        progress=lambda done, total: job.progress("filling the index", done, total),
    )
    entries = int(filled.index.ntotal)
    return IndexManifest(
        name=filled.kind,
        kind=filled.kind,
        index_key=filled.index_key,
        keys=job.manifest.keys,
        table_version=job.table.version,
        mark=job.table.mark,
        count=entries,
        entries=entries,
        nprobe=settings.nprobe,
        code_bytes_per_key=_code_size(filled.index, job.work),
        # faiss reads its file into memory; ids and next tokens stay mapped.
        resident_bytes_per_key=(job.work / INDEX_FILE).stat().st_size / max(entries, 1) + 2,
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
        left_out=left_out(job.work).size,
        settings=settings.to_json()
        | {"rows": job.table.count, "trained_on": filled.trained_on}
        | _per_picture(job),
        metrics=filled.metrics,
    )


def _code_size(index: Any, folder: Path) -> float:
    """Bytes of code an entry takes in the index; of a graph, what its file takes an entry."""
    inner: Any = (
        faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    )
    size = getattr(inner, "code_size", None)
    return float(size or (folder / INDEX_FILE).stat().st_size / index.ntotal)


def _weights(
    job: _Job, older: IndexManifest | None
) -> tuple[tuple[float, ...] | None, dict[str, Any] | None]:
    """The offsets' weights, and what is known of learned ones; a grown index keeps its own."""
    if older is not None:
        return older.weights, older.metrics.get("weights")
    if job.settings.weights != "learned":
        return job.settings.typed_weights(job.manifest.keys), None
    kept = job.work / "weights.json"
    if not kept.exists():
        write_json(str(kept), asdict(_fit(job)))
    fitted = read_json(str(kept))
    return tuple(fitted["weights"]), fitted


def _fit(job: _Job) -> FittedWeights:
    """Learn the weights from two disjoint samples of the table's own pictures."""
    settings = WeightSettings(seed=job.settings.seed)
    images = ImageTable(job.layout.images)
    asked = sample_queries(
        *(images, job.manifest.tokenizer, job.manifest.keys),
        pictures=2 * settings.pictures,
        queries=2 * settings.queries,
        seed=settings.seed,
        split="database",
    )
    pictures = np.unique(asked.images)
    judges = np.random.default_rng(settings.seed).permutation(pictures)[: len(pictures) // 2]
    judge = np.isin(asked.images, judges)
    judged = replace(
        asked.take(judge),
        protocol=f"{np.count_nonzero(judge)} queries from {len(judges)} pictures that were not used",
    )
    return fit_weights(
        job.table.sample(settings.entries, seed=settings.seed),
        job.codes,
        asked.take(~judge),
        judged,
        settings,
        lambda step: job.progress(f"learning weights, {step}", 0, 1),
    )


def _certified(
    job: _Job, built: IndexManifest, seconds: float, announce: Callable[[str], None]
) -> IndexManifest:
    """The manifest with what was measured against exact search over the whole table."""
    engine, entries = open_engine(built, job.work, job.codes)
    opened = PatchIndex(built, engine, entries, job.codes)
    queries = index_queries(job.layout, job.manifest)
    aside = copies_left_aside(engine.parts) if isinstance(engine, CodebookSearch) else None
    job.progress("searching exactly", 0, job.table.count)
    exact = exact_neighbors(
        *(job.table, job.codes, queries, DEEPEST),
        weights=built.weights,
        skip=aside,
        left_out=left_out(job.work),
        resources=job.resources,
        announce=announce,
        progress=lambda done, total: job.progress("searching exactly", done, total),
    )

    def distances_of(ids: Ids) -> Floats:
        return true_distances(job.table.blocks(), job.codes, queries, ids, weights=built.weights)

    measured = certify(
        *(opened, queries, exact, Target.parse(job.settings.target_recall)),
        distances_of=distances_of if built.kind == "ivfpq" else None,
        threads=faiss.omp_get_max_threads(),
        nprobe=job.settings.nprobe,
        progress=lambda nprobe: job.progress(f"measuring nprobe {nprobe or '-'}", 0, 1),
    )
    ten = str(min(10, DEEPEST))
    return replace(
        built,
        nprobe=measured.chosen.nprobe,
        recall_at_10=measured.chosen.recall[ten],
        ms_per_query=measured.ms_per_query[ten]["batch"],
        certificate=measured.to_json() | {"build_seconds": seconds},
    )


def index_queries(layout: Layout, manifest: DatabaseManifest) -> Queries:
    """The queries by which every index of a database is judged."""
    return sample_queries(
        *(ImageTable(layout.images), manifest.tokenizer, manifest.keys),
        pictures=QUERY_PICTURES,
        queries=QUERIES,
    )


def _require_memory(job: _Job, size: int) -> None:
    """Raise BadInputError for an index that would take more than the user allows it."""
    if size > size_in_bytes("--memory", job.settings.memory):
        raise BadInputError(
            f"an index of {job.table.count:,} keys takes about {size / 10**9:.1f} GB of memory when all"
            f" of it is in use, more than --memory {job.settings.memory}; allow more"
        )


def _note_left_out(job: _Job) -> None:
    """Note which pictures are not to be taken: removed ones, and copies where they are unwanted."""
    removed = Tombstones(job.layout).ids
    if job.settings.dedup == "images":
        copies = duplicate_images(ImageTable(job.layout.images), removed)
        removed = np.union1d(removed, copies)
    if len(removed):
        np.save(job.work / LEFT_OUT_FILE, removed)


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


def _still_stands(older: IndexManifest, table: PatchTable) -> bool:
    """Whether the rows that an index was made from stand in the fragments they stood in."""
    return table.rows_up_to(older.mark) == int(older.settings["rows"])


def _older(
    layout: Layout, name: str, settings: IndexSettings, table: PatchTable, compacted: bool
) -> IndexManifest | None:
    """The index of this name where it can be built upon: made the same way from rows that stand,
    or that a compaction has just moved."""
    try:
        older = IndexManifest.read(layout.index(name))
    except ArragError:
        return None
    if older.kind != "codebook" or _settings_of(older.settings) != _settings_of(settings.to_json()):
        return None
    if not (compacted or _still_stands(older, table)):
        return None
    outgrown = table.count > OUTGROWN * older.settings["trained_for"]
    return None if outgrown else older


def _settings_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in SAME_BUILD}


def _work_folder(
    layout: Layout,
    name: str,
    settings: IndexSettings,
    table: PatchTable,
    older: IndexManifest | None,
) -> Path:
    """The folder in which the index is being built, as a killed build of the same plan left it."""
    plan = {
        "table_version": table.version,
        "settings": _settings_of(settings.to_json()),
        "grows": None if older is None else [older.table_version, *older.parts],
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    work = building_folder(layout.indexes, name)
    resumable = settings.kind == "codebook" and (work / f"plan-{digest}").exists()
    if not resumable:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / f"plan-{digest}").touch()
    return work


def _put(place: str, work: Path) -> None:
    """Put a finished index in place of an older one of its name."""
    for left in (*work.glob("plan-*"), work / "weights.json"):
        left.unlink(missing_ok=True)
    put_folder(work, place)
