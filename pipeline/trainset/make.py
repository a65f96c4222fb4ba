"""Make a training set for FAiD: captions, token grids, and what every position retrieves.

open the database and its index → choose the pictures → subtract those in the table → retrieve in
batches on Ray → commit each in order → describe the set in its manifest.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.ids import ROW_BITS, Ids, contains, shard_number
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.location import (
    delete_place,
    exists,
    join,
    make_folder,
    names_in,
    read_bytes,
    resolved_place,
    write_bytes,
)
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook, write_codebook
from arrag_runtime.format.training_set import (
    SETTINGS,
    TRAINSET_CODEBOOK,
    TRAINSET_MANIFEST,
    TRAINSET_ROWS,
    TrainsetManifest,
    trainset_schema,
)
from arrag_runtime.progress import Progress, silent
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.search.tombstones import Tombstones
from pipeline.resources.lease import lease
from pipeline.resources.ray_session import encoder_pool, ray_cluster
from pipeline.trainset.worker import Task, TrainsetWorker, write_rows
from schemas.settings.resources import RayResources
from schemas.settings.trainset import TrainsetSettings
from stages.sources import locate_source, open_source
from stages.tables.row_table import RowTable

IMAGES_PER_TASK = 32
"""Pictures a task of the database's own: some 16,000 searches on a 24 x 24 grid."""
EXPORT_ROWS = 512


@dataclass(frozen=True)
class TrainsetReport:
    """What was made."""

    folder: str
    manifest: TrainsetManifest
    images: int
    """Rows in it."""
    added: int
    """Rows of this run."""
    captionless: int
    """Pictures left out for want of a caption; those of another source are not counted."""

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "trainset": self.folder,
            "images": self.images,
            "added": self.added,
            "captionless": self.captionless,
            "k": self.manifest.k,
            "positions": self.manifest.tokenizer.positions,
            "pictures": self.manifest.pictures,
            "index": self.manifest.index,
        }

    def to_text(self) -> str:
        """Two lines for people."""
        left_out = f", {self.captionless:,} without a caption left out" if self.captionless else ""
        return (
            f"training set {self.folder}: {self.images:,} pictures ({self.added:,} new{left_out}),"
            f" {self.manifest.k} retrieved tokens at each of {self.manifest.tokenizer.positions}"
            f" positions\npictures: {self.manifest.pictures}; index: {self.manifest.index}"
        )


def make_trainset(settings: TrainsetSettings, progress: Progress = silent) -> TrainsetReport:
    """Make the training set, or add to it what it lacks; an interrupted one goes on.

        made = make_trainset(TrainsetSettings(database="mydb", limit=50_000))
        print(made.folder, made.images)

    progress counts tasks. Raises ArragError for what the user can mend.
    """
    source = settings.source
    if source is not None and source.limit is None:
        settings = replace(settings, source=replace(source, limit=settings.limit))
    layout = Layout(settings.database)
    database = DatabaseManifest.read(layout)
    folder = resolved_place(settings.out or join(layout.root, "trainset"))
    with lease(layout, "arrag-db trainset") as held:
        index = PatchIndex.open(layout.root, settings.index)
        removed = Tombstones(layout).ids
        images = ImageTable(layout.images, removed)
        wanted = _describe(settings, database, index, images)
        rows = _open_rows(folder, wanted, removed)
        tasks, captionless = _tasks(settings, wanted, images, rows)
        if rows is None:
            make_folder(folder)
            write_codebook(Layout(folder), read_codebook(layout))
            rows = RowTable.create(join(folder, TRAINSET_ROWS), trainset_schema(wanted))
        worker = TrainsetWorker(
            layout.root,
            index.manifest.name,
            join(folder, TRAINSET_ROWS),
            wanted,
            settings.source and locate_source(settings.source),
            settings.tokenizer_weights,
            "cuda" if settings.resources.gpus else "cpu",
        )
        added = 0
        if tasks:
            # Until everything wanted is there, the folder holds no complete set.
            delete_place(join(folder, TRAINSET_MANIFEST))
            with ray_cluster(settings.resources):
                written = _run(tasks, worker, settings.resources)
                for done, (fragments, count) in enumerate(written, start=1):
                    held.check()
                    rows.append(fragments)
                    added += count
                    progress("retrieving", done, len(tasks))
        finished = replace(wanted, images=rows.count())
        if not finished.images:
            raise BadInputError(
                f"no picture of {wanted.pictures} has a caption, and training needs captions; name"
                " another --source, or build the database from one with captions"
            )
        held.check()
        write_bytes(join(folder, TRAINSET_MANIFEST), (finished.to_json() + "\n").encode())
    return TrainsetReport(folder, finished, finished.images, added, captionless)


def _describe(
    settings: TrainsetSettings, database: DatabaseManifest, index: PatchIndex, images: ImageTable
) -> TrainsetManifest:
    """What the rows are made with. Raises for settings that do not go together."""
    keys = index.manifest.keys
    if not keys.neighborhood.is_causal:
        raise IncompatibleError(
            f"index {index.manifest.name} has {keys.neighborhood.name} keys, which see later tokens;"
            " FAiD predicts from earlier ones: index a causal neighbourhood"
        )
    if settings.source is not None and settings.pictures is not None:
        raise BadInputError("--source and --from both say where pictures come from; give one")
    if settings.source is not None:
        pictures = " ".join((settings.source.name, *settings.source.input))
    else:
        held_out = len(images.captioned("heldout")[0]) > 0
        pictures = settings.pictures or ("heldout" if held_out else "database")
    version = index.manifest.table_version
    return TrainsetManifest(
        database.tokenizer, keys, settings.k, index.manifest.name, version, pictures
    )


def _open_rows(folder: str, wanted: TrainsetManifest, removed: Ids) -> RowTable | None:
    """The table that exists, None where there is none yet.

    Raises where it was made otherwise than wanted, or holds pictures that were removed since.
    """
    rows = RowTable.open(join(folder, TRAINSET_ROWS))
    if rows is None:
        ours = {TRAINSET_CODEBOOK, TRAINSET_MANIFEST, TRAINSET_ROWS}
        if others := sorted(set(names_in(folder)) - ours):
            raise BadInputError(
                f"{folder} is no training set and not empty (it holds {others[0]}); name an empty"
                " or new folder with --out"
            )
        return None
    have = TrainsetManifest.from_json((rows.schema.metadata or {}).get(SETTINGS, b""), folder)
    for option, own, new in (
        ("--k", have.k, wanted.k),
        ("index", have.index, wanted.index),
        ("version of the patches", have.table_version, wanted.table_version),
        ("pictures", have.pictures, wanted.pictures),
        ("tokenizer", have.tokenizer.fingerprint(), wanted.tokenizer.fingerprint()),
        ("keys", have.keys.name, wanted.keys.name),
    ):
        if own != new:
            raise IncompatibleError(
                f"training set {folder} was made with {option} {own}, not {new}; name another folder"
                " with --out, or delete this one"
            )
    if count := int(np.count_nonzero(contains(removed, rows.column("image_id").to_numpy()))):
        raise IncompatibleError(
            f"training set {folder} holds {count} pictures that were removed from the database since;"
            " delete it and make it again"
        )
    return rows


def _tasks(
    settings: TrainsetSettings, wanted: TrainsetManifest, images: ImageTable, rows: RowTable | None
) -> tuple[list[Task], int]:
    """What is still to be done, in a fixed order, and the pictures left out for want of a caption."""
    have = np.empty(0, np.int64) if rows is None else rows.column("image_id").to_numpy()
    if settings.source is not None:
        done = set((have >> ROW_BITS).tolist())
        shards = open_source(settings.source).listing([]).shards
        return [shard for shard in shards if shard_number(shard.id) not in done], 0
    captioned, captionless = images.captioned(wanted.pictures)
    done = set(have.tolist())
    todo = [image for image in _chosen(captioned, settings.limit) if image not in done]
    starts = range(0, len(todo), IMAGES_PER_TASK)
    return [todo[start : start + IMAGES_PER_TASK] for start in starts], captionless


def _chosen(captioned: Ids, limit: int | None) -> list[int]:
    """The first `limit` pictures in the order of a hash, so that a larger limit only adds some."""

    def order(image: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"trainset {image}".encode()).digest(), image

    return sorted(captioned.tolist(), key=order)[:limit]


def _run(
    tasks: Sequence[Task], worker: TrainsetWorker, resources: RayResources
) -> Iterator[tuple[list[str], int]]:
    """What `write_rows` gives for all tasks in their order, a bounded number at work at once.

    Raises ArragError for a task that failed; what came before it is committed.
    """
    gpus = 1 if resources.gpus else 0
    remote: Any = ray.remote(num_cpus=resources.threads, num_gpus=gpus)(write_rows)
    settings, waiting = ray.put(worker), iter(tasks)
    ahead = islice(waiting, 2 * encoder_pool(resources).largest)
    running = deque(remote.remote(settings, task) for task in ahead)
    while running:
        try:
            written: tuple[list[str], int] = ray.get(running.popleft())
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ArragError):
                raise error.cause from error
            raise ArragError(
                f"retrieving failed: {error.cause}; what came before is kept, and the same command"
                " goes on"
            ) from error
        except ray.exceptions.RayError as error:
            raise ArragError(
                f"a worker died ({str(error).splitlines()[0]}); what came before is kept, and the"
                " same command goes on"
            ) from error
        running.extend(remote.remote(settings, task) for task in islice(waiting, 1))
        yield written


def export_trainset(folder: str | Path, path: Path) -> None:
    """Write a training set as one Arrow file, rows by image id, to train where Lance is not."""
    place = resolved_place(folder)
    rows = RowTable.open(join(place, TRAINSET_ROWS))
    if rows is None or not exists(join(place, TRAINSET_MANIFEST)):
        raise BadInputError(f"{folder} holds no complete training set; make it first")
    metadata = {
        TRAINSET_MANIFEST.encode(): read_bytes(join(place, TRAINSET_MANIFEST)),
        TRAINSET_CODEBOOK.encode(): read_bytes(join(place, TRAINSET_CODEBOOK)),
    }
    schema = rows.schema.with_metadata(metadata)
    order = np.argsort(rows.column("image_id").to_numpy(), kind="stable")
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(order), EXPORT_ROWS):
            table = rows.take(order[start : start + EXPORT_ROWS].tolist())
            writer.write_table(table.replace_schema_metadata(metadata))
    temporary.replace(path)
