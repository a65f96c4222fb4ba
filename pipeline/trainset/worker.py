"""What a Ray task does for a training set: retrieve for every position of some pictures.

In: pictures of the database by id, or a shard of another source. Out: written, uncommitted fragments
of rows, as the driver commits them. A picture never retrieves itself or a copy of itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.format.neighborhood import MISSING, Neighborhood
from arrag_runtime.format.training_set import TrainsetManifest, trainset_schema
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.tokenizers import Tokenizer, Tokens
from pipeline.query import load_database_tokenizer
from schemas.records import Attempt, GridRecord, GridShape, ImageRecord, Reject, Shard
from schemas.settings.download import DownloadSettings
from schemas.settings.source import SourceSettings
from stages.download.download_links import download_links
from stages.encode.decode import DecodeSettings
from stages.encode.encode_images import EncodeSettings, encode_shard
from stages.removal.suppression import read_suppressions, suppress
from stages.sources import open_source
from stages.tables.committer import write_fragments

NO_IMAGE = -1


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
class Pictures:
    """ids: int64 [B]; hashes of the original files; captions; grids: uint16 [B, h, w]."""

    ids: Ids
    hashes: list[str]
    captions: list[str]
    grids: Tokens


@dataclass(frozen=True)
class Written:
    """Fragments of rows, and how many there are."""

    fragments: list[str]
    images: int


def write_pictures(worker: TrainsetWorker, image_ids: list[int]) -> Written:
    """The rows of these pictures of the database."""
    images = ImageTable(Layout(worker.database).images)
    rows, height = images.rows(image_ids), worker.manifest.tokenizer.grid_height
    grids = images.grids(image_ids, height)
    pictures = Pictures(
        np.array(image_ids, np.int64),
        [rows[image].sha256 for image in image_ids],
        [rows[image].caption or "" for image in image_ids],
        np.stack([grids[image] for image in image_ids]),
    )
    return _write(worker, images, pictures)


def write_shard(worker: TrainsetWorker, shard: Shard) -> Written:
    """The rows of the captioned pictures of this shard of another source, encoded on the way."""
    assert worker.source is not None
    layout = Layout(worker.database)
    encoder = DatabaseManifest.read(layout).encoder
    settings = EncodeSettings(
        batch_size=encoder.batch_size if worker.device == encoder.device else 1,
        decode=DecodeSettings(size=worker.manifest.tokenizer.image_size),
    )
    tokenizer = _tokenizer(worker.database, worker.tokenizer_weights, worker.device)
    suppressions = read_suppressions(layout)
    spec = worker.manifest.tokenizer
    grid = GridShape(spec.grid_height, spec.grid_width, spec.vocabulary)
    source = open_source(replace(worker.source, grid=grid))
    inputs: Iterator[ImageRecord | GridRecord | Reject] = download_links(
        suppress(source.read(shard), suppressions),
        DownloadSettings(),
        Attempt(shard),
        suppressions=suppressions,
    )
    encoded = encode_shard(tokenizer, inputs, settings)
    told = [n for n, image in enumerate(encoded.images) if image.record.caption]
    pictures = Pictures(
        encoded.image_ids(shard)[told],
        [encoded.images[n].sha256 for n in told],
        [encoded.images[n].record.caption or "" for n in told],
        encoded.tokens[told],
    )
    return _write(worker, ImageTable(layout.images), pictures)


def _write(worker: TrainsetWorker, images: ImageTable, pictures: Pictures) -> Written:
    exclude = copies_in_database(images, pictures)
    index = _index(worker.database, worker.index)
    found = retrieve(index, pictures.grids, exclude, worker.manifest.k)
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
    return Written(write_fragments(worker.rows, table), count)


def copies_in_database(images: ImageTable, pictures: Pictures) -> Ids:
    """For each picture the ids of the database's pictures with the same bytes, int64 [B, M].

    Held-out pictures have no patches, so they are none; filled up with -1.
    """
    copies = images.copies(pictures.hashes)
    rows = images.rows(image for ids in copies.values() for image in ids)
    own = [
        [image for image in copies.get(sha256, ()) if rows[image].split == "database"]
        for sha256 in pictures.hashes
    ]
    width = max((len(ids) for ids in own), default=0)
    padded = [ids + [NO_IMAGE] * (width - len(ids)) for ids in own]
    return np.array(padded, np.int64).reshape(len(own), width)


def retrieve(index: PatchIndex, grids: Tokens, exclude: Ids, k: int) -> npt.NDArray[np.uint16]:
    """The k retrieved tokens of every position, uint16 [B, h · w, K]; `MISSING` for none.

    grids: uint16 [B, h, w]; exclude: int64 [B, M], pictures whose entries must not be returned.
    """
    hood: Neighborhood = index.manifest.keys.neighborhood
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
    """The index, opened once per process."""
    return PatchIndex.open(database, name)


@lru_cache(maxsize=1)
def _tokenizer(database: str, weights: str | None, device: str) -> Tokenizer:
    """The database's tokenizer, loaded once per process."""
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    tokenizer = load_database_tokenizer(layout, manifest, weights)
    if device != "cpu":
        tokenizer.setup(device, precision=manifest.encoder.precision)
    return tokenizer
