"""Index a database: build in a folder of its own, measure it against exact search, put it in place.

what there is to index → decide what becomes of the index in place (`indexing.growth`) → make the
parts (`indexing.steps`) → measure them → put them in place. A killed build of a codebook index goes
on with the first step that is missing; one of another kind starts again.
"""

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from arrag_runtime.format import manifest as files
from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.inverted_lists import CENTROIDS, ListPart
from arrag_runtime.format.location import finish_replacements
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.format.specs import Floats
from arrag_runtime.progress import Progress, silent
from arrag_runtime.search.codebook_search import CodebookSearch
from arrag_runtime.search.patch_index import PatchIndex, open_engine
from arrag_runtime.search.tombstones import Tombstones
from pipeline.indexing import growth
from pipeline.indexing.exact import copies_left_aside, exact_neighbors
from pipeline.indexing.steps import PartsJob, make_parts
from pipeline.indexing.work_folder import empty_work_folder, put_index, work_folder
from pipeline.resources.lease import lease
from pipeline.resources.malloc import give_memory_back
from schemas.settings.index import IndexSettings, size_in_bytes
from schemas.settings.resources import RayResources
from stages.index.faiss_index import require_autofaiss, train_and_fill
from stages.index.index_contents import left_out
from stages.measure.certificate import Target, certify
from stages.measure.exact_search import Queries, true_distances
from stages.measure.fit_weights import WeightSettings, learn_weights
from stages.measure.sample_queries import sample_queries
from stages.tables.committer import Committer
from stages.tables.ledger import read_ledger

_QUERY_PICTURES, _QUERIES = 100, 1000
_DEEPEST = 2048
"""How many neighbours the certificate looks at."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What there is to index, how, and at which place; `older` is built upon, None for nothing."""

    name: str
    layout: Layout
    manifest: DatabaseManifest
    settings: IndexSettings
    table: PatchTable
    codes: Floats
    place: str
    older: IndexManifest | None
    decision: growth.Decision
    moved: bool
    """Whether a compaction moved the rows of an older index: its count must prove it whole."""
    work: Path
    resources: RayResources | None
    progress: Progress


def index(
    database: str | Path,
    settings: IndexSettings,
    *,
    name: str | None = None,
    min_recall: float | None = None,
    compacted: bool = False,
    resources: RayResources | None = None,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _cost: None,
) -> IndexManifest:
    """Build an index over the database's patches, or bring the one of this name up to date.

        made = index("mydb", IndexSettings(kind="codebook"), min_recall=0.9)
        print(made.recall_at_10, made.nprobe)

    name: by default the index's kind. min_recall: below this recall at the target's k the index is
    not put in place. compacted: the table was just compacted, so an index that held all of its rows
    only has to lose those that are gone. resources: the Ray cluster to fill and measure on; by
    default this process does it unless the table is large. progress: told of every step; announce:
    told what a long measurement will cost, before it starts. Returns the manifest of the index,
    with what was measured. Raises ArragError for what the user can mend, and then leaves nothing
    behind.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise BadInputError(
            f"--name '{name}' is no name for a folder; use letters, digits, - and _"
        )
    target = Target.parse(settings.target_recall)
    give_memory_back()
    with lease(layout, "arrag-db index") as held:
        started = time.perf_counter()
        # Rows of shards that a killed build left unfinished must not be indexed.
        Committer(layout, manifest.keys, held.check).recover(read_ledger(layout))
        table = PatchTable(layout.patches(manifest.keys))
        settings = settings.resolved(manifest.keys, table.count)
        if settings.kind == "ivfpq":
            require_autofaiss()
        name = name or str(settings.kind)
        finish_replacements(layout.indexes)
        place = layout.index(name)
        unwanted = growth.unwanted_pictures(layout, settings)
        older = growth.index_made_alike(place, settings)
        decision, moved = growth.FRESH, False
        if older is not None:
            facts = growth.facts_of(place, older, table, unwanted, compacted=compacted)
            decision, moved = growth.decide(facts), not facts.rows_stand
        older = older if decision.kept else None
        job = _Job(
            name=name,
            layout=layout,
            manifest=manifest,
            settings=settings,
            table=table,
            codes=files.read_codebook(layout),
            place=place,
            older=older,
            decision=decision,
            moved=moved,
            work=work_folder(layout, name, settings, table, older, unwanted),
            resources=resources,
            progress=progress,
        )
        try:
            built = _build_codebook(job) if settings.kind == "codebook" else _build_faiss(job)
            final = _certified(job, built, time.perf_counter() - started, announce)
            reached = final.certificate["chosen"]["recall"][str(target.k)]
            if min_recall is not None and reached < min_recall:
                raise BadInputError(
                    f"index {name} has a recall of {reached:.3f}, below --min-recall {min_recall},"
                    " so it was not put in place; give more --nprobe or another --kind"
                )
        except ArragError:
            shutil.rmtree(job.work, ignore_errors=True)
            raise
        final.write(job.work)
        held.check()
        put_index(place, job.work)
        return final


def _build_codebook(job: _Job) -> IndexManifest:
    """The parts of a codebook index in the work folder, and a manifest without measurements."""
    work, settings, table, older = job.work, job.settings, job.table, job.older
    weights, fitted = _weights(job)
    layout = CodeLayout(job.manifest.keys, job.codes, weights)
    size = table.count * (layout.size + 2)
    if size > size_in_bytes("--memory", settings.memory):
        raise BadInputError(
            f"an index of {table.count:,} keys takes about {size / 10**9:.1f} GB of memory when all"
            f" of it is in use, more than --memory {settings.memory}; allow more"
        )
    unwanted = work / files.LEFT_OUT_FILE
    parts_job = PartsJob(
        table=table,
        layout=layout,
        settings=settings,
        work=work,
        left_out=unwanted if unwanted.exists() else None,
        resources=job.resources,
        progress=job.progress,
    )
    parts = make_parts(parts_job, job.decision, job.place)
    opened = [ListPart.open(work / part, layout.size) for part in parts]
    lists = len(np.load(work / CENTROIDS, mmap_mode="r"))
    entries = sum(part.entries for part in opened)
    count = sum(part.keys for part in opened)
    unwanted_ids = left_out(work)
    if job.decision.rewrites and job.moved and count != table.count_without(unwanted_ids):
        # It did not hold all rows of the table, so what it lacks is not known.
        empty_work_folder(work, unwanted_ids)
        return _build_codebook(replace(job, older=None, decision=growth.FRESH))
    trained_for = table.count if older is None else int(older.settings["trained_for"])
    return IndexManifest(
        name=job.name,
        kind="codebook",
        index_key=f"IVF{lists},PQ{layout.keys.neighborhood.size}x{layout.bits} (the codebook)",
        keys=job.manifest.keys,
        table_version=table.version,
        mark=table.mark,
        count=count,
        entries=entries,
        nprobe=settings.nprobe,
        code_bytes_per_key=entries * layout.size / max(count, 1),
        resident_bytes_per_key=entries * (layout.size + 2) / max(count, 1),
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
        left_out=unwanted_ids.size,
        parts=parts,
        weights=weights,
        temperature=None if fitted is None else fitted["temperature"],
        settings=_kept_settings(job) | {"trained_for": trained_for},
        metrics={} if fitted is None else {"weights": fitted},
    )


def _kept_settings(job: _Job) -> dict[str, Any]:
    """What the index was asked to be, and the size of its table."""
    per_image = job.manifest.patches_per_image
    return job.settings.to_json() | {"rows": job.table.count, "patches_per_image": per_image}


def _build_faiss(job: _Job) -> IndexManifest:
    """A flat or ivfpq index in the work folder, and a manifest without measurements."""
    settings = job.settings
    filled = train_and_fill(
        job.table,
        job.codes,
        job.work,
        settings,
        left_out(job.work),
        progress=lambda done, total: job.progress("filling the index", done, total),
    )
    entries = int(filled.index.ntotal)
    file_bytes = (job.work / files.INDEX_FILE).stat().st_size
    inner = filled.index
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return IndexManifest(
        name=job.name,
        kind=filled.kind,
        index_key=filled.index_key,
        keys=job.manifest.keys,
        table_version=job.table.version,
        mark=job.table.mark,
        count=entries,
        entries=entries,
        nprobe=settings.nprobe,
        # A graph has no codes of its own.
        code_bytes_per_key=float(getattr(inner, "code_size", None) or file_bytes / entries),
        # faiss reads its file into memory; ids and next tokens stay mapped.
        resident_bytes_per_key=file_bytes / max(entries, 1) + 2,
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
        left_out=left_out(job.work).size,
        settings=_kept_settings(job) | {"trained_on": filled.trained_on},
        metrics=filled.metrics,
    )


def _weights(job: _Job) -> tuple[tuple[float, ...] | None, dict[str, Any] | None]:
    """The offsets' weights, and what is known of learned ones; a grown index keeps its own."""
    if job.older is not None:
        return job.older.weights, job.older.metrics.get("weights")
    if job.settings.weights != "learned":
        return job.settings.typed_weights(job.manifest.keys), None
    kept = job.work / "weights.json"
    if not kept.exists():
        learned = learn_weights(
            job.table,
            ImageTable(job.layout.images, Tombstones(job.layout).ids),
            job.manifest.tokenizer,
            job.manifest.keys,
            job.codes,
            left_out(job.work),
            WeightSettings(seed=job.settings.seed),
            lambda step: job.progress(f"learning weights, {step}", 0, 1),
        )
        files.write_json(str(kept), asdict(learned))
    fitted = files.read_json(str(kept))
    return tuple(fitted["weights"]), fitted


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
        job.table,
        job.codes,
        queries,
        _DEEPEST,
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
        opened,
        queries,
        exact,
        Target.parse(job.settings.target_recall),
        distances_of=distances_of if built.kind == "ivfpq" else None,
        threads=faiss.omp_get_max_threads(),
        nprobe=job.settings.nprobe,
        progress=lambda nprobe: job.progress(f"measuring nprobe {nprobe or '-'}", 0, 1),
    )
    return replace(
        built,
        nprobe=measured.chosen.nprobe,
        recall_at_10=measured.chosen.recall["10"],
        ms_per_query=measured.ms_per_query["10"]["batch"],
        certificate=asdict(measured) | {"build_seconds": seconds},
    )


def index_queries(layout: Layout, manifest: DatabaseManifest) -> Queries:
    """The queries by which every index of a database is judged."""
    return sample_queries(
        ImageTable(layout.images, Tombstones(layout).ids),
        manifest.tokenizer,
        manifest.keys,
        pictures=_QUERY_PICTURES,
        queries=_QUERIES,
    )
