"""Index a database: train and fill in a temporary folder, measure, then move it into place."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from arrag_runtime.patch_index import PatchIndex
from pipeline.lease import lease
from schemas.manifest import (
    IDS_FILE,
    TOKENS_FILE,
    DatabaseManifest,
    IndexManifest,
    Layout,
    read_codebook,
)
from schemas.specs import Floats, key_vectors
from stages.build_index import FilledIndex, IndexSettings, train_and_fill
from stages.measure_recall import NO_IMAGE, RecallQueries, measure_recall
from stages.read_images import ImageTable
from stages.read_patches import PatchTable

RECALL_AT = 10
QUERY_IMAGES, QUERIES = 100, 1000


def index_database(
    database: Path,
    settings: IndexSettings,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> IndexManifest:
    """Build an index over the database's patches; one of the same name is replaced when it is done.

    `name` defaults to the index's kind. Raises ArragError for what the user can mend.
    """
    layout = Layout(database.expanduser().resolve())
    manifest = DatabaseManifest.read(layout)
    with lease(layout, "arrag-db index"):
        started = time.perf_counter()
        table = PatchTable(layout.patches(manifest.keys))
        codes = read_codebook(layout)
        layout.indexes.mkdir(exist_ok=True)
        draft = layout.indexes / f".draft-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            filled = train_and_fill(table, codes, draft, settings, progress)
            built = time.perf_counter() - started
            described = _measure(layout, manifest, table, codes, filled, settings, draft, built)
            final = described(name or filled.kind)
            final.write(draft)
            _replace(layout.index(final.name), draft)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
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
    own = ids[chosen // per_image]
    return RecallQueries(
        key_vectors(keys.reshape(total, -1)[chosen], codes),
        np.full(len(chosen), NO_IMAGE) if held_out else own,
        f"{len(chosen)} queries from {len(ids)} "
        + ("held-out pictures" if held_out else "pictures of the database, their own excluded"),
    )


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
    fields: dict[str, Any] = {
        "kind": filled.kind,
        "index_key": filled.index_key,
        "keys": manifest.keys,
        "table_version": table.version,
        "count": table.count,
        "nprobe": filled.nprobe,
        "code_bytes_per_key": float(_code_size(filled.index)),
        "settings": asdict(settings)
        | {"patches_per_image": int(size), "trained_on": filled.trained_on},
        "metrics": filled.metrics,
    }
    unmeasured = IndexManifest(
        name="draft", ms_per_query=0.0, recall_at_10=0.0, recall_protocol={}, **fields
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
    fields |= {"ms_per_query": 1000 * spent / len(recall), "recall_at_10": float(recall.mean())}
    return lambda name: IndexManifest(name=name, recall_protocol=protocol, **fields)


def _code_size(index: Any) -> int:
    """Bytes of code an entry takes in the index."""
    inner: Any = (
        faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    )
    return int(inner.code_size)


def _replace(folder: Path, draft: Path) -> None:
    """Put a finished index in place of an older one of its name."""
    old = folder.with_name(f".old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
