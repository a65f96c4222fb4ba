"""Index a database: train and fill in a temporary folder, measure, then move it into place."""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from arrag_runtime.patch_index import PatchIndex, index_folders, newest_index
from pipeline.lease import lease
from schemas.errors import BadInputError
from schemas.location import draft_folder, put_folder, tidy_drafts
from schemas.manifest import (
    IDS_FILE,
    INDEX_FILE,
    TOKENS_FILE,
    DatabaseManifest,
    IndexManifest,
    Layout,
    read_codebook,
)
from schemas.specs import Floats, key_vectors
from schemas.tables import Ids
from stages.build_index import FilledIndex, IndexSettings, train_and_fill
from stages.measure_recall import NO_IMAGE, RecallQueries, measure_recall
from stages.patch_table import Committer, read_ledger
from stages.read_images import ImageTable
from stages.read_patches import PatchTable

RECALL_AT = 10
QUERY_IMAGES, QUERIES = 100, 1000


def index_database(
    database: str | Path,
    settings: IndexSettings,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> IndexManifest:
    """Build an index over the database's patches; one of the same name is replaced when it is done.

    `name` defaults to the index's kind. Raises ArragError for what the user can mend.
    """
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise BadInputError(
            f"--name '{name}' is no name for a folder; use letters, digits, - and _"
        )
    with lease(layout, "arrag-db index"):
        started = time.perf_counter()
        # Rows of shards that a killed build left unfinished must not be indexed.
        Committer(layout, manifest.keys).recover(read_ledger(layout))
        tidy_drafts(layout.indexes)
        table = PatchTable(layout.patches(manifest.keys))
        codes = read_codebook(layout)
        with draft_folder(layout.indexes) as draft:
            filled = train_and_fill(table, codes, draft, settings, progress)
            built = time.perf_counter() - started
            described = _measure(layout, manifest, table, codes, filled, settings, draft, built)
            final = described(name or filled.kind)
            final.write(draft)
            put_folder(draft, layout.index(final.name))
        return final


def recall_queries(layout: Layout, manifest: DatabaseManifest, codes: Floats) -> RecallQueries:
    """Queries as generation asks them: token keys, from held-out pictures where there are any.

    Otherwise from pictures of the database, each with its own picture excluded.
    """
    images = ImageTable(layout.images)
    ids, grids = images.sample("heldout", QUERY_IMAGES, seed=0)
    held_out = len(ids) > 0
    if not held_out:
        ids, grids = images.sample("database", QUERY_IMAGES, seed=0)
    spec = manifest.tokenizer
    keys = manifest.keys.neighborhood.keys(grids.reshape(-1, spec.grid_height, spec.grid_width))
    per_image = keys.shape[1]
    rng = np.random.default_rng(0)
    total = len(ids) * per_image
    chosen = np.sort(rng.choice(total, min(QUERIES, total), replace=False))
    vectors = key_vectors(keys.reshape(total, -1)[chosen], codes)
    asked = f"{len(chosen)} queries from {len(ids)}"
    if held_out:
        none = np.full((len(chosen), 1), NO_IMAGE)
        return RecallQueries(vectors, none, f"{asked} held-out pictures")
    exclude = _with_copies(images, ids)[chosen // per_image]
    return RecallQueries(vectors, exclude, f"{asked} pictures of the database, their own excluded")


def _with_copies(images: ImageTable, ids: Ids) -> Ids:
    """Each picture's id and those of its copies, int64 [N, M], filled up with -1."""
    rows = images.rows(ids.tolist())
    copies = images.copies(row.sha256 for row in rows.values())
    own = [copies[rows[int(image)].sha256] for image in ids]
    width = max(len(group) for group in own)
    return np.array([group + [NO_IMAGE] * (width - len(group)) for group in own], np.int64)


def _measure(
    layout: Layout,
    manifest: DatabaseManifest,
    table: PatchTable,
    codes: Floats,
    filled: FilledIndex,
    settings: IndexSettings,
    draft: Path,
    built_seconds: float,
) -> Callable[[str], IndexManifest]:
    """The index's manifest but for its name, with recall and time measured as users search."""
    size = manifest.keys.neighborhood.positions(
        manifest.tokenizer.grid_height, manifest.tokenizer.grid_width
    ).size
    described: dict[str, Any] = {
        "kind": filled.kind,
        "index_key": filled.index_key,
        "keys": manifest.keys,
        "table_version": table.version,
        "count": table.count,
        "nprobe": filled.nprobe,
        "code_bytes_per_key": _code_size(filled.index, draft),
        "settings": asdict(settings)
        | {"patches_per_image": int(size), "trained_on": filled.trained_on},
        "metrics": filled.metrics,
    }
    unmeasured = IndexManifest(
        name="draft", ms_per_query=0.0, recall_at_10=0.0, recall_protocol={}, **described
    )
    opened = PatchIndex(
        unmeasured,
        filled.index,
        np.load(draft / IDS_FILE, mmap_mode="r"),
        np.load(draft / TOKENS_FILE, mmap_mode="r"),
        codes,
    )
    queries = recall_queries(layout, manifest, codes)
    exclude = None if (queries.exclude == NO_IMAGE).all() else queries.exclude
    answer = opened.search_vectors(queries.vectors, RECALL_AT, exclude=exclude)
    started = time.perf_counter()
    opened.search_vectors(queries.vectors, RECALL_AT)
    spent = time.perf_counter() - started
    recall = measure_recall(table, codes, queries, answer.patch_ids)
    protocol = {
        "queries": queries.protocol,
        "against": "exact L2 over the whole table; ties at the 10th distance are hits",
        "recall_at_10_lowest_tenth": float(np.quantile(recall, 0.1)),
        "threads": faiss.omp_get_max_threads(),
        "build_seconds": built_seconds,
    }
    described |= {"ms_per_query": 1000 * spent / len(recall), "recall_at_10": float(recall.mean())}
    return lambda name: IndexManifest(name=name, recall_protocol=protocol, **described)


def _code_size(index: Any, draft: Path) -> float:
    """Bytes of code an entry takes in the index; of a graph, what its file takes an entry."""
    inner: Any = (
        faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    )
    size = getattr(inner, "code_size", None)
    return float(size or (draft / INDEX_FILE).stat().st_size / index.ntotal)


@dataclass(frozen=True)
class StaleIndex:
    """An index to be built: its name, None for that of its kind, and how."""

    name: str | None
    settings: IndexSettings


def stale_index(database: str | Path) -> StaleIndex | None:
    """What a build leaves to be indexed: nothing, a first index, or the newest one again."""
    layout = Layout(database)
    keys = DatabaseManifest.read(layout).keys
    count = PatchTable(layout.patches(keys)).count
    if not count:
        return None
    if not index_folders(layout):
        return StaleIndex(None, IndexSettings())
    newest = IndexManifest.read(newest_index(layout))
    if newest.count == count:
        return None
    known = {field.name for field in fields(IndexSettings)}
    settings = IndexSettings(**{k: v for k, v in newest.settings.items() if k in known})
    return StaleIndex(newest.name if settings.kind else None, settings)
