"""The steps of building a codebook index: train the lists, fill parts, merge them.

Each step writes one file or folder that appears complete or not at all, so a killed build goes on
with the first that is missing. Steps of one kind are independent of each other and may run
anywhere.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.inverted_lists import CENTROIDS, GRAPH, ListPart
from arrag_runtime.format.patches import PatchTable, TablePart
from arrag_runtime.format.specs import Floats, key_vectors
from schemas.settings.index import IndexSettings, choose_lists, size_in_bytes
from stages.index.coarse_lists import POINTS_PER_LIST, ListFinder, train_centroids, write_graph
from stages.index.fill_lists import HELD_A_KEY, MERGE_ENTRIES, fill_part, merge_parts

_FIXED_BYTES = 400 << 20
"""What a worker takes with the libraries and one block, whatever the part."""
_TRAINED_ON_AT_MOST = 16_000_000


@dataclass(frozen=True)
class FillStep:
    """Fill one part: rows of a table at a pinned version into `folder`, grouped by list."""

    table: str
    version: int
    rows: TablePart
    centroids: Path
    """The file of the trained centroids."""
    folder: Path
    layout: CodeLayout


@dataclass(frozen=True)
class MergeStep:
    """Merge parts into `folder`, in canonical order."""

    parts: tuple[Path, ...]
    folder: Path
    lists: tuple[int, int]
    """The first list that is taken, and one past the last."""
    layout: CodeLayout
    max_copies: int
    """Identical entries beyond this many are stored once."""
    left_out: Path | None
    """A file of the ids of pictures whose entries are not taken."""


def run_step(step: FillStep | MergeStep) -> None:
    """Do one step; nothing where its folder already stands."""
    folder, layout = step.folder, step.layout
    if folder.exists():
        return
    if isinstance(step, FillStep):
        centroids: Floats = np.load(step.centroids)
        blocks = PatchTable(step.table, step.version).blocks(part=step.rows)
        finder, lists = ListFinder(centroids), len(centroids)
        fill_part(folder, blocks, finder, layout, lists=lists, keys=step.rows.count)
    else:
        parts = [ListPart.open(part, layout.size) for part in step.parts]
        left_out = None if step.left_out is None else np.load(step.left_out)
        most = step.max_copies
        merge_parts(folder, parts, layout, max_copies=most, left_out=left_out, lists=step.lists)


def train_lists(
    table: PatchTable, layout: CodeLayout, settings: IndexSettings, folder: Path
) -> Floats:
    """Train the coarse centroids on a uniform sample and write them; read them where they stand.

    Raises BadInputError for an empty table or more lists than it has keys.
    """
    path = folder / CENTROIDS
    if path.exists():
        trained: Floats = np.load(path)
        return trained
    if table.count == 0:
        raise BadInputError("the patches table is empty, so there is nothing to index; build first")
    lists = settings.lists or choose_lists(table.count, settings.query_ms)
    if lists > table.count:
        raise BadInputError(
            f"--lists {lists} is more than the table has keys ({table.count}); pass fewer"
        )
    wanted = min(lists * POINTS_PER_LIST, _TRAINED_ON_AT_MOST)
    sample = table.sample_keys(wanted, seed=settings.seed)
    np.random.default_rng(settings.seed).shuffle(sample)
    vectors_of = partial(key_vectors, codes=layout.codes, weights=layout.weights)
    centroids = train_centroids(sample, lists, seed=settings.seed, vectors_of=vectors_of)
    write_graph(centroids, folder / GRAPH)
    draft = path.with_name(f".{path.name}")
    np.save(draft, centroids)
    draft.rename(path)
    return centroids


def part_rows(settings: IndexSettings) -> int:
    """Rows that one worker may hold in its memory. Raises BadInputError if it is too little."""
    memory = size_in_bytes("--worker-memory", settings.worker_memory)
    rows = (memory - _FIXED_BYTES) // HELD_A_KEY
    if rows < MERGE_ENTRIES // 2:
        needed = (_FIXED_BYTES + HELD_A_KEY * MERGE_ENTRIES // 2) / 10**9
        raise BadInputError(
            f"--worker-memory {settings.worker_memory} is too little to fill lists in; give at least"
            f" {needed:.1f}GB"
        )
    return rows


def merge_steps(
    parts: tuple[Path, ...],
    folder: Path,
    layout: CodeLayout,
    settings: IndexSettings,
    left_out: Path | None,
    entries: int,
) -> list[MergeStep]:
    """The steps that merge parts: one, or where these are large, one for each range of lists."""
    sizes = sum(np.diff(ListPart.open(part, layout.size).starts) for part in parts)
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    wanted = max(1, -(-total // entries))
    cuts = np.searchsorted(ends, np.arange(1, wanted) * total // wanted, side="right")
    bounds: list[int] = np.unique([0, *cuts, len(ends)]).tolist()
    return [
        MergeStep(parts, folder / f"slice-{n:05}", lists, layout, settings.max_copies, left_out)
        for n, lists in enumerate(pairwise(bounds))
    ]
