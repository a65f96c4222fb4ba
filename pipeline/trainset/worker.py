"""What a Ray task does for a training set: retrieve for every position of some pictures.

In: pictures of the database by id, or a shard of another source. Out: written, uncommitted fragments
of rows, as the driver commits them. A picture never retrieves itself or a copy of itself.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.ids import NO_IMAGE, Ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.training_set import TrainsetManifest, trainset_schema
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.tokenizers import Tokenizer, Tokens
from pipeline.query import load_database_tokenizer
from schemas.records import Attempt, GridShape, Shard
from schemas.settings.download import DownloadSettings
from schemas.settings.source import SourceSettings
from stages.download.download_links import download_links
from stages.encode.decode import DecodeSettings
from stages.encode.encode_images import EncodeSettings, encode_shard
from stages.removal.suppression import read_suppressions, suppress
from stages.sources import open_source
from stages.tables.committer import write_fragments

Task = list[int] | Shard
"""What one Ray task works on: pictures of the database by id, or a shard of another source."""


@dataclass(frozen=True)
class TrainsetWorker:
    """Everything a task needs to know besides its pictures. source None: the database's own."""

    database: str
    index: str
    rows: str
    manifest: TrainsetManifest
    source: SourceSettings | None
    tokenizer_weights: str | None
    device: str


@dataclass(frozen=True)
class _Pictures:
    """ids: int64 [B]; hashes of the original files; captions; grids: uint16 [B, h, w]."""

    ids: Ids
    hashes: list[str]
    captions: list[str]
    grids: Tokens


def write_rows(worker: TrainsetWorker, task: Task) -> tuple[list[str], int]:
    """Write the rows of a task's pictures; their fragments, and how many rows there are."""
    images = ImageTable(Layout(worker.database).images)
    pictures = _read(worker, task) if isinstance(task, Shard) else _known(worker, images, task)
    index = _index(worker.database, worker.index)
    exclude = images.copies_of(pictures.hashes)
    found = _retrieve(index, pictures.grids, exclude, worker.manifest.k)
    count = len(pictures.ids)
    table = pa.table(
        [
            pa.array(pictures.ids),
            pa.array(pictures.hashes, pa.string()),
            pa.array(pictures.captions, pa.string()),
            fixed_lists(pictures.grids.reshape(count, worker.manifest.tokenizer.positions)),
            fixed_lists(found.reshape(count, found.shape[1] * found.shape[2])),
        ],
        schema=trainset_schema(worker.manifest),
    )
    return write_fragments(worker.rows, table), count


def _known(worker: TrainsetWorker, images: ImageTable, image_ids: list[int]) -> _Pictures:
    """These pictures of the database."""
    rows = images.rows(image_ids)
    grids = images.grids(image_ids, worker.manifest.tokenizer.grid_height)
    return _Pictures(
        np.array(image_ids, np.int64),
        [rows[image].sha256 for image in image_ids],
        [rows[image].caption or "" for image in image_ids],
        np.stack([grids[image] for image in image_ids]),
    )


def _read(worker: TrainsetWorker, shard: Shard) -> _Pictures:
    """The captioned pictures of this shard of another source, encoded on the way."""
    assert worker.source is not None
    layout, spec = Layout(worker.database), worker.manifest.tokenizer
    encoder = DatabaseManifest.read(layout).encoder
    settings = EncodeSettings(
        batch_size=encoder.batch_size if worker.device == encoder.device else 1,
        decode=DecodeSettings(size=spec.image_size),
    )
    tokenizer = _tokenizer(worker.database, worker.tokenizer_weights, worker.device)
    suppressions = read_suppressions(layout)
    grid = GridShape(spec.grid_height, spec.grid_width, spec.vocabulary)
    items = suppress(open_source(replace(worker.source, grid=grid)).read(shard), suppressions)
    encoded = encode_shard(
        tokenizer,
        download_links(items, DownloadSettings(), Attempt(shard), suppressions=suppressions),
        settings,
    )
    told = [n for n, image in enumerate(encoded.images) if image.record.caption]
    return _Pictures(
        encoded.image_ids(shard)[told],
        [encoded.images[n].sha256 for n in told],
        [encoded.images[n].record.caption or "" for n in told],
        encoded.tokens[told],
    )


def _retrieve(index: PatchIndex, grids: Tokens, exclude: Ids, k: int) -> npt.NDArray[np.uint16]:
    """The k retrieved tokens of every position, uint16 [B, h · w, K]; `MISSING` for none.

    grids: uint16 [B, h, w]; exclude: int64 [B, M], pictures whose entries must not be returned.
    """
    hood = index.manifest.keys.neighborhood
    batch, height, width = grids.shape
    positions, keys = hood.positions(height, width), hood.keys(grids)
    found = np.full((batch, height * width, k), MISSING, np.uint16)
    excluding = (exclude != NO_IMAGE).any(axis=1)
    for some, out in ((~excluding, None), (excluding, exclude)):
        if not some.any():
            continue
        asked = keys[some].reshape(-1, keys.shape[2])
        without = None if out is None else np.repeat(out[some], len(positions), axis=0)
        answer = index.search(asked, k, exclude=without)
        real = np.arange(k) < answer.count[:, None]
        tokens = np.where(real, answer.tokens, MISSING).reshape(-1, len(positions), k)
        found[np.flatnonzero(some)[:, None], positions] = tokens
    return found


@lru_cache(maxsize=1)
def _index(database: str, name: str) -> PatchIndex:
    return PatchIndex.open(database, name)


@lru_cache(maxsize=1)
def _tokenizer(database: str, weights: str | None, device: str) -> Tokenizer:
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    tokenizer = load_database_tokenizer(layout, manifest, weights)
    if device != "cpu":
        tokenizer.setup(device, precision=manifest.encoder.precision)
    return tokenizer
