"""Makes the parts of a codebook index as decided: links, fills and merges them.

Filling and merging are steps that run here one after the other, or as tasks on Ray. They leave
folders behind that tell what is done, so which of them ran where makes no difference.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.inverted_lists import CENTROIDS, GRAPH, ListPart
from arrag_runtime.format.location import local_folder
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.progress import Progress
from pipeline.indexing.growth import Decision
from pipeline.indexing.work_folder import link_files
from pipeline.resources.malloc import give_memory_back
from pipeline.resources.ray_session import ray_cluster, run_tasks
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

_RAY_FROM_STEPS = 8
"""Steps from which an embedded Ray's start is worth it."""
_MERGED_BY_A_STEP = 1 << 26
"""Entries that one step merges, about."""


@dataclass(frozen=True, kw_only=True)
class PartsJob:
    """What the parts of an index are made from, where and by whom."""

    table: PatchTable
    layout: CodeLayout
    settings: IndexSettings
    work: Path
    """The folder in which it is made."""
    left_out: Path | None
    """A file of pictures not to take; None to take all."""
    resources: RayResources | None
    """The Ray cluster to use; None works here unless there are many steps."""
    progress: Progress


def make_parts(job: PartsJob, decision: Decision, place: str) -> tuple[str, ...]:
    """The names of the parts, made as decided from the index at `place` and the table.

    What stands from a killed build is not made again. Raises BadInputError for lists that the
    table has too few keys for, or an nprobe outside of them.
    """
    work, merged = job.work, decision.merged
    # A killed build may have come as far as the merged part and lost some of those it is made of.
    if merged is None or not (work / merged).exists():
        if decision.kept:
            link_files(local_folder(place), work, [CENTROIDS, GRAPH, *decision.kept])
        if decision.filled is not None:
            _fill(job, decision.filled, decision.after)
        if merged is not None:
            _merge(job, tuple(work / part for part in decision.parts), merged)
    if merged is None:
        return decision.parts
    for part in decision.parts:
        shutil.rmtree(work / part, ignore_errors=True)
    return (merged,)


def _fill(job: PartsJob, name: str, after: int) -> None:
    """Train the lists unless they are there, and write the table's keys as one part.

    after: only fragments of higher numbers are taken.
    """
    table, layout, settings, work = job.table, job.layout, job.settings, job.work
    job.progress("training the lists", 0, 1)
    lists = len(train_lists(table, layout, settings, work))
    if settings.nprobe is not None and not 1 <= settings.nprobe <= lists:
        raise BadInputError(f"--nprobe {settings.nprobe} is outside 1..{lists} lists")
    if (work / name).exists():
        return
    fills = [
        FillStep(
            table=table.path,
            version=table.version,
            rows=rows,
            centroids=work / CENTROIDS,
            folder=work / f"fill-{number:05}",
            layout=layout,
        )
        for number, rows in enumerate(table.parts(part_rows(settings), after=after))
    ]
    _run_steps(job, "filling the lists", fills)
    _merge(job, tuple(step.folder for step in fills), name)
    for step in fills:
        shutil.rmtree(step.folder)


def _merge(job: PartsJob, folders: tuple[Path, ...], name: str) -> None:
    """Merge the parts in these folders into one."""
    merges = merge_steps(
        folders, job.work, job.layout, job.settings, job.left_out, _MERGED_BY_A_STEP
    )
    _run_steps(job, "merging the lists", merges)
    if len(merges) == 1:
        merges[0].folder.rename(job.work / name)
        return
    append_parts(job.work / name, [ListPart.open(m.folder, job.layout.size) for m in merges])
    for step in merges:
        shutil.rmtree(step.folder)


def _run_steps(job: PartsJob, doing: str, steps: Sequence[FillStep | MergeStep]) -> None:
    """Run these steps, in any order; the first that fails ends the run with its error."""
    job.progress(doing, 0, len(steps))
    if job.resources is None and len(steps) < _RAY_FROM_STEPS:
        for done, step in enumerate(steps, start=1):
            run_step(step)
            job.progress(doing, done, len(steps))
        return
    with ray_cluster(job.resources or RayResources()):
        for done, _ in enumerate(run_tasks(_one_thread, steps), start=1):
            job.progress(doing, done, len(steps))


def _one_thread(step: FillStep | MergeStep) -> None:
    """A task has one core, so faiss must not start a thread for each of the machine's."""
    import faiss

    faiss.omp_set_num_threads(1)
    give_memory_back()
    run_step(step)
