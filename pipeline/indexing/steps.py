"""Runs the steps of a codebook index: here one after the other, or as tasks on Ray.

The steps leave folders behind that tell what is done, so which of them ran where makes no difference.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.inverted_lists import CENTROIDS, ListPart
from arrag_runtime.format.patches import PatchTable
from pipeline.resources.malloc import give_memory_back
from pipeline.resources.ray_session import ray_cluster
from schemas.settings.index import IndexSettings
from schemas.settings.resources import RayResources
from stages.index.codebook_index import (
    FillStep,
    MergeStep,
    merge_steps,
    part_rows,
    run_step,
    train_lists,
)
from stages.index.fill_lists import append_parts

RAY_FROM = 8
"""Steps from which an embedded Ray's start is worth it."""
MERGED_BY_A_STEP = 1 << 26

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is."""


def fill_lists(
    table: PatchTable,
    layout: CodeLayout,
    settings: IndexSettings,
    work: Path,
    *,
    name: str,
    after: int = -1,
    left_out: Path | None,
    resources: RayResources | None,
    progress: Progress,
) -> None:
    """Train the lists unless they are there, and write the table's keys as part `name` in `work`.

    after: only fragments of higher numbers are taken. left_out: a file of pictures not to take.
    resources: the Ray cluster to use; None fills here unless the table is large.
    """
    progress("training the lists", 0, 1)
    lists = len(train_lists(table, layout, settings, work))
    if settings.nprobe is not None and not 1 <= settings.nprobe <= lists:
        raise BadInputError(f"--nprobe {settings.nprobe} is outside 1..{lists} lists")
    if (work / name).exists():
        return
    fills = [
        FillStep(
            *(table.path, table.version, rows),
            *(str(work / CENTROIDS), str(work / f"fill-{number:05}"), layout),
        )
        for number, rows in enumerate(table.parts(part_rows(settings), after=after))
    ]
    run_steps(fills, resources, lambda done, total: progress("filling the lists", done, total))
    merge_into(
        work,
        tuple(step.folder for step in fills),
        name,
        layout,
        settings,
        left_out,
        resources,
        progress,
    )
    for step in fills:
        shutil.rmtree(step.folder)


def merge_into(
    work: Path,
    parts: tuple[str, ...],
    name: str,
    layout: CodeLayout,
    settings: IndexSettings,
    left_out: Path | None,
    resources: RayResources | None,
    progress: Progress,
) -> None:
    """Merge these parts into one part `name` in `work`."""
    merges = merge_steps(parts, work, layout, settings, left_out, MERGED_BY_A_STEP)
    run_steps(merges, resources, lambda done, total: progress("merging the lists", done, total))
    if len(merges) == 1:
        Path(merges[0].folder).rename(work / name)
        return
    append_parts(work / name, [ListPart.open(Path(step.folder), layout.size) for step in merges])
    for step in merges:
        shutil.rmtree(step.folder)


def run_steps(
    steps: Sequence[FillStep | MergeStep],
    resources: RayResources | None,
    progress: Callable[[int, int], None],
) -> None:
    """Run these steps, in any order; the first that fails ends the run with its error."""
    progress(0, len(steps))
    if resources is None and len(steps) < RAY_FROM:
        for done, step in enumerate(steps, start=1):
            run_step(step)
            progress(done, len(steps))
        return
    with ray_cluster(resources or RayResources()):
        cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        task: Any = ray.remote(num_cpus=1, max_retries=2)(_one_thread)
        coming = iter(steps)
        waiting = [task.remote(s) for s in islice(coming, 2 * max(1, int(cluster.get("CPU", 1))))]
        done = 0
        while waiting:
            [ready], waiting = ray.wait(waiting, num_returns=1)
            ray.get(ready)
            done += 1
            progress(done, len(steps))
            waiting += [task.remote(step) for step in islice(coming, 1)]


def _one_thread(step: FillStep | MergeStep) -> str:
    """A task has one core, so faiss must not start a thread for each of the machine's."""
    import faiss

    faiss.omp_set_num_threads(1)
    give_memory_back()
    return run_step(step)


def link_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Make files and folders of one index part of another, without copying where a link will do."""
    for name in names:
        origin = source / name
        if origin.is_dir():
            (target / name).mkdir(exist_ok=True)
            link_files(origin, target / name, [path.name for path in origin.iterdir()])
        elif origin.exists() and not (target / name).exists():
            try:
                os.link(origin, target / name)
            except OSError:
                # A killed copy must not pass for a whole one.
                draft = target / f".{name}.writing"
                shutil.copy2(origin, draft)
                draft.rename(target / name)


def copies_left_aside(parts: Sequence[ListPart]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The patch ids, ascending, that are stored as a copy of another and are no entry of their own."""
    none = np.empty(0, np.int64)
    aside = []
    for part in parts:
        first = np.zeros(len(part.copies_ids), bool)
        first[part.copies_start[:-1]] = True
        aside.append(part.copies_ids[~first])
    return np.sort(np.concatenate([none, *aside]))
