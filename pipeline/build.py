"""Build or extend a database: the function to read first.

open the source and the database → plan what the ledger lacks → record the plan → run the shards on
Ray → commit each as it comes back → retry what failed → describe the run in the manifest.
With `retry_rejects` the work is the rejects that have these reasons instead, and nothing else.
"""

import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.settings import values_of
from pipeline.building import plan_shards as planning
from pipeline.building.database import create_database, resolve_database
from pipeline.building.run_shards import ShardFailure, VersionCleaner, run_shards
from pipeline.building.shard_worker import WorkerSettings
from pipeline.remove import hide_suppressed
from pipeline.resources.lease import lease
from pipeline.resources.malloc import return_free_memory
from pipeline.resources.ray_session import EncoderPool, encoder_pool, ray_cluster
from schemas.records import GridShape
from schemas.settings.build import BuildSettings
from schemas.settings.download import DownloadSettings
from stages.download.fetch import user_agent
from stages.encode.decode import DecodeSettings
from stages.encode.encode_images import EncodeSettings
from stages.sources import locate_source, open_source
from stages.tables.committer import Committer, ShardResult
from stages.tables.ledger import read_ledger

log = logging.getLogger(__name__)
ATTEMPTS = 3
"""A failed shard is tried this often in one build."""
_UNPACKED = "/runtime_resources/working_dir_files/"
"""In the path of a submitted job's copy of the working folder, which Ray deletes after the job."""


@dataclass
class BuildReport:
    """What a build did."""

    shards_done: int = 0
    shards_skipped: int = 0
    """Shards that the database had already."""
    failed: dict[str, str] = field(default_factory=dict)
    """The last error of each shard that failed."""
    inputs: int = 0
    images: int = 0
    heldout: int = 0
    patches: int = 0
    retried: int = 0
    """Rejects that were tried again."""
    rejects: Counter[str] = field(default_factory=Counter)
    stage_seconds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    encode_seconds: float = 0.0
    """From the first shard's start to the last commit."""
    agreement: float | None = None
    """The smallest share of token ids that a shard's first batch has in common with float32."""
    notes: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Pictures committed per second, from the first shard's start to the last commit."""
        return self.images / self.encode_seconds if self.encode_seconds else 0.0

    def add(self, result: ShardResult) -> None:
        """Count a committed shard."""
        self.shards_done += 1
        self.inputs += result.inputs
        self.images += result.images
        self.heldout += result.heldout
        self.patches += result.patches
        self.retried += len(result.retried)
        self.rejects.update(result.rejects)
        self.stage_seconds.update(result.seconds)
        if result.agreement is not None:
            self.agreement = min(self.agreement or 1.0, result.agreement)

    def to_text(self, retried: Sequence[str] = ()) -> str:
        """Lines for people. retried: the reasons, where the build tried rejects again."""
        notes = [f"note: {note}" for note in self.notes]
        if not self.shards_done and not self.failed:
            done = f"all {self.shards_skipped} shards are in the database"
            none = f"no open rejects with {','.join(retried)} to be had from this --input"
            return "\n".join([*notes, f"nothing to do: {none if retried else done}"])
        again = f"{self.retried:,} rejects tried again"
        lines = [
            f"{again if retried else f'{self.inputs:,} inputs'} = {self.images:,} images +"
            f" {self.rejects.total():,} rejects; {self.heldout:,} held out, {self.patches:,}"
            f" patches; {self.images_per_second:.1f} images/s, {self.seconds:.0f} s in all"
        ]
        lines += [f"  rejected {n:,}: {reason}" for reason, n in self.rejects.most_common()]
        if self.agreement is not None:
            lines.append(f"  {self.agreement:.2%} of token ids agree with float32 (first batches)")
        return "\n".join([*notes, *lines])


BuildProgress = Callable[[int, BuildReport], None]
"""Called with the number of shards to do and the report so far, after every change."""


def build(
    settings: BuildSettings, progress: BuildProgress = lambda _total, _report: None
) -> BuildReport:
    """Build the database, or add to it what it lacks of the source.

        pictures = SourceSettings(name="folder", input=("pictures",), limit=10_000)
        report = build(BuildSettings(database="mydb", source=pictures, hold_out=0.1))
        print(report.images, report.rejects)

    It is not indexed yet; `pipeline.index` does that. Raises ArragError for input that the
    user can mend; shards that failed `ATTEMPTS` times are in the report, the others are done.
    """
    started = time.perf_counter()
    layout = Layout(settings.database)
    settings = replace(settings, source=locate_source(settings.source))
    if _UNPACKED in layout.root:
        raise BadInputError(
            f"--db {layout.database} is in this job's own copy of the working folder, which goes"
            " with the job; give an absolute path that all nodes share, or a bucket's URI"
        )
    source = open_source(settings.source)
    settings = replace(settings, download=_absolute(settings.download))
    planning.require_reasons(settings.retry_rejects)
    user_agent(settings.download.contact)  # Refuses a contact that fits no header.
    report = BuildReport()
    with lease(layout, "arrag-db build") as held:
        # Everything that can refuse the build comes before the first thing it creates.
        manifest, codebook = resolve_database(layout, settings)
        state = read_ledger(layout)
        if settings.retry_rejects:
            # Raises BadInputError where there is no database yet.
            DatabaseManifest.read(layout)
            attempts = planning.next_attempts(layout, state, source.name, settings.retry_rejects)
            work = planning.plan_attempts(source, state, attempts)
        else:
            work = planning.plan_shards(source, state)
        report.shards_skipped = work.skipped
        report.notes += work.notes
        # What a killed build left in the tables goes; a database that is yet to be made has none.
        if (work.todo or state.unfinished) and exists(layout.manifest):
            dropped = Committer(layout, manifest.keys, held.check).recover(state)
            report.notes += [f"dropped {dropped} rows that a killed build left"] if dropped else []
        # Shards by the thousand are held once: by the plan that is being carried out.
        del state
        if work.todo:
            with ray_cluster(settings.resources):
                pool = encoder_pool(settings.resources)
                if not exists(layout.manifest):
                    create_database(layout, manifest, codebook)
                worker = _worker_settings(layout, manifest, settings)
                committer = Committer(layout, manifest.keys, held.check, VersionCleaner())
                total = 0
                while work.todo:
                    committer.plan(work.fresh)
                    committer.plan_again(a for a in work.todo if a.rows)
                    total += len(work.todo)
                    _run(work, worker, pool, settings, committer, report, total, progress)
                    if settings.retry_rejects:
                        break
                    del work
                    return_free_memory()
                    # A tar that proved longer than one shard has more to list now.
                    work = planning.plan_shards(source, read_ledger(layout))
                    todo = tuple(a for a in work.todo if a.shard.id not in report.failed)
                    work = replace(work, todo=todo)
        report.seconds = time.perf_counter() - started
        if exists(layout.manifest):
            held.check()
            # What was removed while its shard was under way has come in all the same.
            if receipt := hide_suppressed(layout.root, "arrag-db build"):
                report.notes.append(
                    f"{receipt.images} pictures on the list of removed ones came in and are hidden"
                    f" (receipt {receipt.id})"
                )
            _describe_run(layout, manifest, settings, report)
    return report


def _worker_settings(
    layout: Layout, manifest: DatabaseManifest, settings: BuildSettings
) -> WorkerSettings:
    spec = manifest.tokenizer
    grid = GridShape(spec.grid_height, spec.grid_width, spec.vocabulary)
    return WorkerSettings(
        database=layout.root,
        source=replace(settings.source, grid=grid),
        tokenizer=spec.name,
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
                size=spec.image_size, max_pixels=settings.max_pixels, min_side=settings.min_side
            ),
        ),
        threads=settings.resources.threads,
        download=settings.download,
    )


def _absolute(download: DownloadSettings) -> DownloadSettings:
    """With the folder for kept images as workers find it, who have another working folder."""
    if download.keep_images is None:
        return download
    if "://" in download.keep_images:
        raise BadInputError(
            f"--keep-images {download.keep_images} is no folder; name one that every worker can"
            " write to"
        )
    return replace(download, keep_images=str(Path(download.keep_images).expanduser().absolute()))


def _run(
    work: planning.Plan,
    worker: WorkerSettings,
    pool: EncoderPool,
    settings: BuildSettings,
    committer: Committer,
    report: BuildReport,
    total: int,
    progress: BuildProgress,
) -> None:
    """Run the planned shards, failed ones again, and commit what comes back."""
    started = time.perf_counter()
    left = {attempt.shard.id: attempt for attempt in work.todo}
    progress(total, report)
    for attempt in range(1, ATTEMPTS + 1):
        for outcome in run_shards(list(left.values()), worker, settings.resources, pool):
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


def _describe_run(
    layout: Layout, manifest: DatabaseManifest, settings: BuildSettings, report: BuildReport
) -> None:
    """Add this run to the manifest: versions, settings, time per stage."""
    if not report.shards_done and settings.source.name in manifest.sources:
        return
    # The options in force, by the names that a `--config` file has, but for the contact's.
    private = {"db", "user-agent-contact"}
    kept = {n: v for n, v in values_of(settings).items() if v is not None and n not in private}
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
        "retry_rejects": list(settings.retry_rejects),
        "shards": report.shards_done,
        "failed": len(report.failed),
        "images": report.images,
        "hours": {name: seconds / 3600 for name, seconds in report.stage_seconds.items()},
        "seconds": report.seconds,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "settings": kept,
    }
    sources = tuple(dict.fromkeys((*manifest.sources, settings.source.name)))
    replace(manifest, sources=sources, runs=(*manifest.runs, run)).write(layout)
