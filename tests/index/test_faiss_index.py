"""Building flat and ivfpq indexes: trained, filled, refused; and what opening makes of damage."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from arrag_runtime import PatchIndex
from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.ids import NO_IMAGE
from arrag_runtime.format.manifest import IDS_FILE, INDEX_FILE, TOKENS_FILE, Layout
from arrag_runtime.format.patches import PatchTable
from schemas.settings.index import IndexSettings
from stages.index.faiss_index import train_and_fill
from stages.index.index_contents import index_contents
from stages.measure.certificate import recall_at
from stages.measure.exact_search import Queries, exact_search, true_distances
from tests.worlds.patch_world import (
    CODES,
    KEYS,
    NONE,
    World,
    add_shard,
    build_index,
    check_neighbors,
    in_memory,
    make_world,
    manifest_of,
    train_with_faiss,
)

logging.getLogger("autofaiss").setLevel(logging.CRITICAL)
OPQ = "OPQ2_8,IVF8,PQ2x4"
PQ = "IVF4,PQ4x4"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three shards of pictures with three indexes."""
    made = make_world(tmp_path_factory.mktemp("db"), 3, 5)
    build_index(made, "flat", kind="flat")
    train_with_faiss(made, PQ, PQ)
    train_with_faiss(made, OPQ, OPQ, nprobe=3)
    return made


@pytest.mark.parametrize("by", ["faiss", pytest.param("autofaiss", marks=pytest.mark.ivfpq)])
@pytest.mark.parametrize("name", [PQ, OPQ])
def test_a_trained_index_holds_every_entry(world: World, name: str, by: str) -> None:
    """All keys are in, ids and tokens at the same place, and most neighbours are found."""
    if by == "autofaiss":
        key, name = name, f"{name} by autofaiss"
        build_index(world, name, kind="ivfpq", index_key=key)
    opened = PatchIndex.open(world.layout.root, name)
    inner = faiss.read_index(str(Path(world.layout.index(name)) / INDEX_FILE))
    assert inner.ntotal == opened.count == len(world.ids)
    folder = Path(world.layout.index(name))
    [held] = index_contents(folder, opened.manifest, CODES)
    assert np.array_equal(held.patch_ids, world.ids)
    assert np.array_equal(held.next_tokens, world.tokens)
    assert opened.lists == faiss.extract_index_ivf(inner).nlist
    opened.nprobe = opened.lists
    found = opened.search(world.keys[::50], 10)
    check_neighbors(found, world, 10)
    nobody = np.full((len(found.count), 1), NO_IMAGE)
    queries = Queries(world.keys[::50], world.tokens[::50], world.ids[::50], nobody, "own keys")
    exact = exact_search(world.table.blocks(), CODES, queries, 10)
    true = true_distances(world.table.blocks(), CODES, queries, found.patch_ids)
    recall = recall_at(true, found.count, exact, 10).mean()
    by_chance = 10 / len(world.ids)
    assert recall > 10 * by_chance


def test_nprobe_reaches_the_lists_behind_a_rotation(world: World) -> None:
    """What the manifest says, and what is set later: on the inner IVF each time."""
    on_disk = faiss.read_index(str(Path(world.layout.index(OPQ)) / INDEX_FILE))
    assert isinstance(on_disk, faiss.IndexPreTransform)
    assert faiss.extract_index_ivf(on_disk).nprobe != 3
    opened = PatchIndex.open(world.layout.root, OPQ)
    assert opened.nprobe == 3
    faiss.extract_index_ivf(on_disk).nprobe = 3
    expected = on_disk.search(world.vectors[:20], len(world.ids))[1]
    found = opened.search(world.keys[:20], len(world.ids))
    assert found.count.tolist() == (expected >= 0).sum(axis=1).tolist()
    seen = []
    for nprobe in (1, 8):
        opened.nprobe = nprobe
        assert opened.nprobe == nprobe
        seen.append(opened.search(world.keys[:20], len(world.ids)).count)
    assert (seen[0] < seen[1]).all()
    assert (seen[1] == len(world.ids)).all()
    for wrong in (0, 9):
        with pytest.raises(BadInputError, match=rf"{wrong} is outside 1\.\.8"):
            opened.nprobe = wrong


def test_progress_is_told_to_the_end(world: World, tmp_path: Path) -> None:
    """Keys count when they are in; an exact index needs no training."""
    seen: list[tuple[int, int]] = []
    filled = train_and_fill(
        world.table,
        CODES,
        tmp_path,
        IndexSettings(kind="flat"),
        NONE,
        lambda done, all_: seen.append((done, all_)),
    )
    assert (filled.kind, filled.index_key, filled.trained_on) == ("flat", "Flat", 0)
    assert seen[-1] == (len(world.ids), len(world.ids))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "flat", "memory": "1KB"}, "Flat.*--memory 1KB"),
        pytest.param(
            {"kind": "ivfpq", "index_key": OPQ, "memory": "1KB"},
            "OPQ2_8.*--memory 1KB",
            marks=pytest.mark.ivfpq,
        ),
        pytest.param(
            {"kind": "ivfpq", "index_key": PQ, "memory": "1KB"},
            "IVF4.*--memory 1KB",
            marks=pytest.mark.ivfpq,
        ),
        ({"kind": "ivfpq", "index_key": "IVF100,PQ4x4"}, "IVF100.*3900 keys.*735"),
        ({"kind": "ivfpq", "index_key": "nonsense"}, "nonsense"),
        ({"kind": "ivfpq", "index_key": "IVF4,PQ5x4"}, "IVF4,PQ5x4"),
        ({"kind": "ivfpq", "index_key": PQ, "nprobe": 5}, r"--nprobe 5 .* 1\.\.4"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    world: World, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """One line that names the setting and the value, whichever library found the fault."""
    with pytest.raises(BadInputError, match=message) as caught:
        train_and_fill(world.table, CODES, tmp_path, IndexSettings(**settings), NONE)
    assert "\n" not in str(caught.value)


@pytest.mark.ivfpq
@pytest.mark.parametrize("key", ["PQ4x4", "IVF4,Flat", "OPQ2_8,PQ2x4"])
def test_other_layouts_of_faiss_work_or_are_refused(world: World, tmp_path: Path, key: str) -> None:
    """Whatever --index-key asks for ends in an index that finds keys, or in one line."""
    settings = IndexSettings(kind="ivfpq", index_key=key)
    try:
        filled = train_and_fill(world.table, CODES, tmp_path, settings, NONE)
    except BadInputError as error:
        assert key in str(error)  # noqa: PT017
        return
    opened = in_memory(manifest_of("other", filled, world), filled.index, world)
    found = opened.search(world.keys[::50], 10)
    check_neighbors(found, world, 10)
    assert (found.count > 0).all()


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    """Nothing to index, with the next step; too few keys to train on likewise."""
    empty = make_world(tmp_path / "a", 1, 0)
    with pytest.raises(BadInputError, match=r"empty.*build first"):
        train_and_fill(empty.table, CODES, tmp_path, IndexSettings(kind="flat"), NONE)
    few = make_world(tmp_path / "b", 1, 2)
    with pytest.raises(BadInputError, match=r"256 keys.*98.*--kind flat"):
        train_and_fill(few.table, CODES, tmp_path, IndexSettings(kind="ivfpq"), NONE)


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Layout:
    """A copy of the database whose flat index may be damaged."""
    shutil.copytree(world.layout.root, tmp_path / "db")
    return Layout(tmp_path / "db")


@pytest.mark.parametrize("file", [IDS_FILE, TOKENS_FILE])
def test_files_of_different_lengths_are_refused(copied: Layout, file: str) -> None:
    """An index whose parts do not belong together never answers."""
    path = Path(copied.index("flat")) / file
    np.save(path, np.load(path)[:-1])
    with pytest.raises(IncompatibleError, match=r"flat is damaged: 73\d patch ids.*index again"):
        PatchIndex.open(copied.root, "flat")


def test_the_vectors_of_another_index_are_refused(copied: Layout) -> None:
    """Fewer vectors than ids and tokens."""
    other = faiss.IndexFlatL2(16)
    other.add(np.zeros((9, 16), np.float32))
    faiss.write_index(other, str(Path(copied.index("flat")) / INDEX_FILE))
    with pytest.raises(IncompatibleError, match="flat is damaged: 9 codes, 735 entries"):
        PatchIndex.open(copied.root, "flat")


@pytest.mark.parametrize("file", [INDEX_FILE, IDS_FILE, TOKENS_FILE])
@pytest.mark.parametrize("missing", [False, True])
def test_a_file_that_is_gone_or_cut_short_is_one_clear_line(
    copied: Layout, file: str, missing: bool
) -> None:
    """The message names the index's folder and says to index again."""
    path = Path(copied.index("flat")) / file
    if missing:
        path.unlink()
    else:
        os.truncate(path, 100)
    with pytest.raises(ArragError, match="index again") as caught:
        PatchIndex.open(copied.root, "flat")
    assert "flat" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_newest_complete_index_is_opened(copied: Layout) -> None:
    """By default the one built last; a folder without a manifest is no index."""
    for age, name in enumerate((PQ, "flat", OPQ)):
        os.utime(Path(copied.index(name)) / "manifest.json", (1000 - age, 1000 - age))
    (Path(copied.indexes) / "unfinished").mkdir()
    assert PatchIndex.open(copied.root).manifest.name == PQ
    with pytest.raises(BadInputError, match=r"unfinished.*arrag-db index"):
        PatchIndex.open(copied.root, "unfinished")
    shutil.rmtree(copied.indexes)
    with pytest.raises(BadInputError, match=r"no index.*arrag-db index"):
        PatchIndex.open(copied.root)


def test_a_table_stays_as_it_was_opened(copied: Layout) -> None:
    """Rows keep their order; a sample repeats nothing; later commits are not seen."""
    table = PatchTable(copied.patches(KEYS))
    whole = np.concatenate([block.patch_ids for block in table.blocks(100)])
    assert len(whole) == table.count == 735
    assert table.take([700, 3, 3]).patch_ids.tolist() == whole[[700, 3, 3]].tolist()
    sample = table.sample(200, seed=1).patch_ids
    assert len(set(sample.tolist())) == 200
    assert set(sample.tolist()) <= set(whole.tolist())
    assert len({number >> 39 for number in sample.tolist()}) == 3
    assert not np.array_equal(sample, table.sample(200, seed=2).patch_ids)
    assert np.array_equal(sample, table.sample(200, seed=1).patch_ids)
    assert np.array_equal(table.sample(5000, seed=1).patch_ids, whole)
    add_shard(copied, 9, np.zeros((2, 7, 7), np.uint16))
    assert table.count == 735
    assert PatchTable(copied.patches(KEYS)).count == 735 + 98
    assert PatchTable(copied.patches(KEYS), table.version).count == 735
    with pytest.raises(BadInputError, match=r"version 999.*arrag-db index"):
        PatchTable(copied.patches(KEYS), 999)
    with pytest.raises(BadInputError, match=r"no patches at.*arrag-db build"):
        PatchTable(f"{copied.root}/nothing.lance")
