"""A small table of patches with everything in it also in memory, and loops to check against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime import Neighbors, PatchIndex
from arrag_runtime.format.ids import patch_ids
from arrag_runtime.format.inverted_lists import ListPart
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.manifest import (
    IDS_FILE,
    INDEX_FILE,
    TOKENS_FILE,
    IndexManifest,
    Layout,
    write_codebook,
)
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.format.specs import TokenizerSpec, key_spec, key_vectors, normalised
from arrag_runtime.search.faiss_search import FaissSearch
from arrag_runtime.search.neighbors import EntryTable
from schemas.records import Shard
from schemas.settings.index import IndexSettings
from schemas.tables import patches_schema
from stages.index.faiss_index import FilledIndex, train_and_fill
from stages.tables.committer import PATCHES, Committer, ShardResult, create_tables, write_fragments

SPEC = TokenizerSpec("toy", 112, 7, 7, 24, 4, "centre crop", "0" * 64)
KEYS = key_spec("causal-1", "zero", "codebook")
CODES = normalised(np.random.default_rng(1).normal(size=(24, 4)))
PER_IMAGE = 49
IMAGES = 15
NONE = np.empty(0, np.int64)
"""No pictures to leave out."""


@dataclass(frozen=True)
class World:
    """A database of patches and all of its entries in memory."""

    layout: Layout
    table: PatchTable
    ids: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint16]
    tokens: npt.NDArray[np.uint16]

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        return key_vectors(self.keys, CODES)


def add_shard(layout: Layout, number: int, grids: npt.NDArray[np.uint16]) -> None:
    """Commit the patches of these grids as one shard."""
    shard = Shard("toy", f"{number << 40:016x}", ("m",))
    images = np.arange(len(grids), dtype=np.int64) + (number << 29)
    positions = KEYS.neighborhood.positions(7, 7)
    columns = [
        pa.array(patch_ids(images, positions).reshape(-1)),
        fixed_lists(KEYS.neighborhood.keys(grids).reshape(-1, KEYS.neighborhood.size)),
        pa.array(grids.reshape(-1)),
    ]
    rows = pa.table(columns, schema=patches_schema(SPEC, KEYS))
    fragments = {PATCHES: write_fragments(layout.patches(KEYS), rows)}
    committer = Committer(layout, KEYS)
    committer.plan([shard])
    committer.commit(ShardResult(shard.id, "toy", 1, 0, 0, 0, len(rows), {}, fragments))


def make_world(root: Path, shards: int, images: int, seed: int = 0) -> World:
    """A table of several fragments; few codes, so that many keys are equally near."""
    layout = Layout(root)
    create_tables(layout, SPEC, KEYS)
    write_codebook(layout, CODES)
    rng = np.random.default_rng(seed)
    for number in range(shards):
        grids = rng.integers(0, 24, (images, 7, 7)).astype(np.uint16)
        grids[:, :, 3:] = grids[:, :, 3:] % 3
        add_shard(layout, number + 1, grids)
    table = PatchTable(layout.patches(KEYS))
    rows = list(table.blocks())
    return World(
        layout,
        table,
        np.concatenate([np.empty(0, np.int64), *(block.patch_ids for block in rows)]),
        np.concatenate([np.empty((0, 4), np.uint16), *(block.keys for block in rows)]),
        np.concatenate([np.empty(0, np.uint16), *(block.next_tokens for block in rows)]),
    )


def build_index(world: World, name: str, **settings: Any) -> FilledIndex:
    """Train and fill an index of the world and write it with its manifest."""
    folder = Path(world.layout.index(name))
    folder.mkdir(parents=True)
    wanted = IndexSettings(**settings)
    filled = train_and_fill(world.table, CODES, folder, wanted, NONE)
    manifest_of(name, filled, world, nprobe=wanted.nprobe).write(folder)
    return filled


def train_with_faiss(world: World, name: str, key: str, *, nprobe: int | None = None) -> None:
    """An ivfpq index that faiss alone trained and filled, written as `build_index` writes one."""
    folder = Path(world.layout.index(name))
    folder.mkdir(parents=True)
    index = faiss.index_factory(world.vectors.shape[1], key)
    index.train(world.vectors)
    index.add(world.vectors)
    faiss.write_index(index, str(folder / INDEX_FILE))
    np.save(folder / IDS_FILE, world.ids)
    np.save(folder / TOKENS_FILE, world.tokens)
    filled = FilledIndex(index, "ivfpq", key, len(world.ids), {})
    manifest_of(name, filled, world, nprobe=nprobe).write(folder)


def manifest_of(
    name: str, filled: FilledIndex, world: World, *, nprobe: int | None = None
) -> IndexManifest:
    """What the index says of itself, but for its measurements."""
    return IndexManifest(
        name=name,
        kind=filled.kind,
        index_key=filled.index_key,
        keys=KEYS,
        table_version=world.table.version,
        mark=world.table.mark,
        count=filled.index.ntotal,
        entries=filled.index.ntotal,
        nprobe=nprobe,
        code_bytes_per_key=0.0,
        resident_bytes_per_key=0.0,
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
        settings={"patches_per_image": PER_IMAGE, "rows": world.table.count},
    )


def in_memory(manifest: IndexManifest, index: Any, world: World) -> PatchIndex:
    """A faiss index over the first entries of the world, opened without files."""
    entries = one_list(world.tokens[: index.ntotal], world.ids[: index.ntotal])
    return PatchIndex(manifest, FaissSearch(index), EntryTable([entries]), CODES)


def one_list(tokens: npt.NDArray[np.uint16], ids: npt.NDArray[np.int64]) -> ListPart:
    """Entries without copies in one list, without codes."""
    starts, codes = np.array([0, len(ids)]), np.empty((len(ids), 0), np.uint8)
    return ListPart(Path(), starts, codes, tokens, ids, NONE, np.zeros(1, np.int64), NONE)


def distances_by_loop(world: World, vector: Any, exclude: int) -> list[tuple[float, int]]:
    """The squared distance and the id of every entry that may be found, nearest first."""
    rows = zip(world.vectors.astype(np.float64), world.ids.tolist(), strict=True)
    wide = np.asarray(vector, np.float64)
    return sorted((float(((row - wide) ** 2).sum()), i) for row, i in rows if i >> 10 != exclude)


def check_neighbors(found: Neighbors, world: World, k: int) -> None:
    """Real entries first, nearest first, with their own tokens; padding is plainly none."""
    token_of = dict(zip(world.ids.tolist(), world.tokens.tolist(), strict=True))
    for row, count in enumerate(found.count.tolist()):
        assert found.tokens[row].shape == found.distances[row].shape == (k,)
        ids = found.patch_ids[row, :count].tolist()
        assert len(set(ids)) == count
        assert found.tokens[row, :count].tolist() == [token_of[i] for i in ids]
        assert (np.diff(found.distances[row, :count]) >= -1e-6).all()
        assert np.isfinite(found.distances[row, :count]).all()
        assert (found.patch_ids[row, count:] == -1).all()
        assert np.isinf(found.distances[row, count:]).all()
        assert (found.tokens[row, count:] == 0).all()
