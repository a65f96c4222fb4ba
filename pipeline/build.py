"""Build or extend a database: the function to read first.

open the source and the database → plan what the ledger lacks → record the plan → run the shards on
Ray → commit each as it comes back → retry what failed → describe the run in the manifest.
"""

import logging
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from pipeline.database import BuildSettings, create_database, resolve_database
from pipeline.lease import lease
from pipeline.plan import Plan, plan
from pipeline.ray_run import (
    ShardFailure,
    ray_cluster,
    run_shards,
    worker_count,
)
from pipeline.remove import take_out_suppressed
from pipeline.shard_worker import WorkerSettings
from schemas.location import exists
from schemas.manifest import DatabaseManifest, Layout
from schemas.records import GridShape, Shard
from stages.decode import DecodeSettings
from stages.encode_images import EncodeSettings
from stages.patch_table import Committer, ShardResult, read_ledger
from stages.sources import locate_source, open_source

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""A failed shard is tried this often in one build."""


@dataclass
class BuildReport:
    """What a build did. `failed` maps a shard to its last error."""

    shards_done: int = 0
    shards_skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    inputs: int = 0
    images: int = 0
    heldout: int = 0
    patches: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    stage_seconds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    encode_seconds: float = 0.0
    agreement: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Pictures committed a second, from the first shard's start to the last commit."""
        return self.images / self.encode_seconds if self.encode_seconds else 0.0

    def add(self, result: ShardResult) -> None:
        """Count a committed shard."""
        self.shards_done += 1
        self.inputs += result.inputs
        self.images += result.images
        self.heldout += result.heldout
        self.patches += result.patches
        self.rejects.update(result.rejects)
        self.stage_seconds.update(result.seconds)
        if result.agreement is not None:
            self.agreement = min(self.agreement or 1.0, result.agreement)


Progress = Callable[[int, BuildReport], None]
"""Called with the number of shards to do and the report so far, after every change."""


def build(
    settings: BuildSettings, progress: Progress = lambda _total, _report: None
) -> BuildReport:
    """Build the database, or add to it what it lacks of the source.

    Raises ArragError for input the user can mend; shards that failed `ATTEMPTS` times are in the
    report, the others are done.
    """
    started = time.perf_counter()
    layout = Layout(settings.database)
    settings = replace(settings, source=locate_source(settings.source))
    source = open_source(settings.source)
    report = BuildReport()
    with lease(layout, "arrag-db build"):
        # Everything that can refuse the build comes before the first thing it creates.
        manifest, codebook = resolve_database(layout, settings)
        state = read_ledger(layout)
        work = plan(source, state)
        report.shards_skipped = work.skipped
        report.notes += work.notes
        if work.todo:
            with ray_cluster(settings.resources):
                workers = worker_count(settings.resources)
                if not exists(layout.manifest):
                    create_database(layout, manifest, codebook)
                worker = _worker_settings(layout, manifest, settings)
                committer = Committer(layout, manifest.keys)
                if dropped := committer.recover(state):
                    report.notes.append(f"dropped {dropped} rows that a killed build left")
                total = 0
                while work.todo:
                    committer.plan(work.fresh)
                    total += len(work.todo)
                    _run(work, worker, workers, settings, committer, report, total, progress)
                    # A tar that proved longer than one shard has more to list now.
                    work = _without(plan(source, read_ledger(layout)), report.failed)
        report.seconds = time.perf_counter() - started
        if exists(layout.manifest):
            # What was removed while its shard was under way has come in all the same.
            if receipt := take_out_suppressed(layout.root, "arrag-db build"):
                report.notes.append(
                    f"{receipt.images} pictures on the list of removed ones came in and are hidden"
                    f" (receipt {receipt.id})"
                )
            _describe_run(layout, manifest, settings, report)
    return report


def _worker_settings(
    layout: Layout, manifest: DatabaseManifest, settings: BuildSettings
) -> WorkerSettings:
    return WorkerSettings(
        database=layout.root,
        source=replace(settings.source, grid=_grid_shape(manifest)),
        tokenizer=manifest.tokenizer.name,
        tokenizer_weights=manifest.tokenizer_weights,
        device=manifest.encoder.device,
        precision=manifest.encoder.precision,
        compile=settings.compile,
        keys=manifest.keys,
        encode=EncodeSettings(
            batch_size=manifest.encoder.batch_size,
            decode_threads=max(2, settings.resources.threads),
            latents=manifest.keys.space == "latent",
            hold_out=manifest.hold_out,
            decode=DecodeSettings(
                size=manifest.tokenizer.image_size,
                max_pixels=settings.max_pixels,
                min_side=settings.min_side,
            ),
        ),
        threads=settings.resources.threads,
    )


def _grid_shape(manifest: DatabaseManifest) -> GridShape:
    spec = manifest.tokenizer
    return GridShape(spec.grid_height, spec.grid_width, spec.vocabulary)


def _run(
    work: Plan,
    worker: WorkerSettings,
    workers: int,
    settings: BuildSettings,
    committer: Committer,
    report: BuildReport,
    total: int,
    progress: Progress,
) -> None:
    """Run the planned shards, failed ones again, and commit what comes back."""
    started = time.perf_counter()
    left: dict[str, Shard] = {shard.id: shard for shard in work.todo}
    progress(total, report)
    for attempt in range(1, ATTEMPTS + 1):
        for outcome in run_shards(list(left.values()), worker, settings.resources, workers):
            if isinstance(outcome, ShardFailure):
                report.failed[outcome.shard] = outcome.error
                log.warning("shard %s failed (%d): %s", outcome.shard, attempt, outcome.error)
            else:
                committer.commit(outcome)
                del left[outcome.shard]
                report.failed.pop(outcome.shard, None)
                report.add(outcome)
                log.info("shard %s: %d images", outcome.shard, outcome.images)
            progress(total, report)
        if not left:
            break
    report.encode_seconds += time.perf_counter() - started


def _without(work: Plan, failed: dict[str, str]) -> Plan:
    return replace(work, todo=tuple(shard for shard in work.todo if shard.id not in failed))


def _describe_run(
    layout: Layout, manifest: DatabaseManifest, settings: BuildSettings, report: BuildReport
) -> None:
    """Add this run to the manifest: versions, settings, time a stage."""
    packages = ("torch", "transformers", "pylance", "pyarrow", "numpy", "pillow", "ray")
    run: dict[str, Any] = {
        "source": settings.source.name,
        "input": list(settings.source.input),
        "where": settings.source.where,
        "limit": settings.source.limit,
        "shuffle_seed": settings.source.shuffle_seed,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "min_side": settings.min_side,
        "max_pixels": settings.max_pixels,
        "shards": report.shards_done,
        "failed": len(report.failed),
        "images": report.images,
        "hours": {name: seconds / 3600 for name, seconds in report.stage_seconds.items()},
        "seconds": report.seconds,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
    if not report.shards_done and settings.source.name in manifest.sources:
        return
    replace(
        manifest,
        sources=tuple(dict.fromkeys((*manifest.sources, settings.source.name))),
        runs=(*manifest.runs, run),
    ).write(layout)
