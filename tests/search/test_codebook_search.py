"""Searching codebook indexes, and what every kind hides, against loops over all entries."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arrag_runtime.search.patch_index
import stages.index.coarse_lists
from arrag_runtime import PatchIndex
from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.ids import split_patch_ids
from arrag_runtime.format.inverted_lists import CENTROIDS, CODES, GRAPH, STARTS, ListPart
from arrag_runtime.format.manifest import IndexManifest, Layout, write_codebook
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.search.codebook_search import CodebookSearch
from arrag_runtime.search.faiss_search import FaissSearch
from arrag_runtime.search.neighbors import EntryTable
from arrag_runtime.search.tombstones import Tombstones
from stages.index.coarse_lists import write_graph
from stages.index.fill_lists import merge_parts
from tests.worlds.code_world import (
    CodeWorld,
    check_answer,
    expected_entries,
    make_codes,
    open_codes,
    write_codes,
)
from tests.worlds.patch_world import one_list

KINDS = ("flat", "lists", "codebook", "copies", "parts", "copies in parts")
MAX_COPIES = 3


@pytest.mark.parametrize(
    ("hood", "border", "vocabulary", "weights"),
    [
        ("causal-1", "skip", 24, None),
        ("causal-1", "zero", 31, (0.4, 1.6, 0.0, 2.0)),
        ("causal-2", "zero", 32, None),
        ("causal-2", "skip", 5, tuple(np.linspace(0.1, 1.9, 12))),
        ("surround-1", "zero", 100, tuple(np.linspace(1.9, 0.1, 8))),
        ("surround-1", "skip", 33, None),
    ],
)
def test_all_lists_together_are_exact(
    tmp_path: Path, hood: str, border: str, vocabulary: int, weights: tuple[float, ...] | None
) -> None:
    """Whatever the neighbourhood, border, vocabulary and weights; also for missing neighbours."""
    world = make_codes(hood, border, vocabulary, weights=weights)
    opened = open_codes(tmp_path, world, write_codes(tmp_path, world, 9, cuts=[330]))
    rng = np.random.default_rng(1)
    asked = np.concatenate([world.keys[::80], world.keys[:5]])
    asked[-5:] = rng.integers(0, vocabulary, asked[-5:].shape)
    asked[-3:, ::2] = MISSING
    asked[-1] = MISSING
    entries = expected_entries(world)
    for k in (1, 10, 500):
        found = opened.search(asked, k)
        for at in range(len(asked)):
            check_answer(found, at, world, asked[at : at + 1], entries)


@pytest.fixture(scope="module")
def twins() -> CodeWorld:
    """Many identical entries, in several pictures each."""
    return make_codes(count=300, distinct=60)


@pytest.fixture(scope="module")
def opened(
    twins: CodeWorld, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[PatchIndex, int]]]:
    """An index of every kind over them, and beyond how many copies it stores one.

    Few spare results are fetched, so that hidden ones make searches fetch again.
    """
    root = tmp_path_factory.mktemp("twins")
    made: dict[str, tuple[PatchIndex, int]] = {}
    for name, cuts, most in (
        ("codebook", (), 10**6),
        ("copies", (), MAX_COPIES),
        ("parts", (250, 250, 290), 10**6),
    ):
        hidden = Tombstones(Layout(root / "none"))
        names = write_codes(root / name, twins, 8, cuts=cuts, max_copies=most)
        made[name] = open_codes(root / name, twins, names, tombstones=hidden), most
    # Parts in which all of a key's copies are in one part, so that loops count them alike.
    order = np.lexsort((twins.tokens, *twins.keys.T))
    sorted_twins = CodeWorld(twins.layout, twins.keys[order], twins.tokens[order], twins.ids[order])
    rows = sorted_twins.keys
    cut = next(n for n in range(100, 300) if (rows[n] != rows[n - 1]).any())
    names = write_codes(root / "cut", sorted_twins, 8, cuts=(cut,), max_copies=MAX_COPIES)
    hidden = Tombstones(Layout(root / "none"))
    made["copies in parts"] = (
        open_codes(root / "cut", twins, names, tombstones=hidden),
        MAX_COPIES,
    )
    for name, key in (("flat", "Flat"), ("lists", "IVF4,Flat")):
        index = faiss.index_factory(twins.layout.dimension, key)
        index.train(twins.vectors)
        index.add(twins.vectors)
        manifest = IndexManifest(
            name=name,
            kind="ivfpq",
            index_key=key,
            keys=twins.layout.keys,
            table_version=1,
            mark=1,
            count=300,
            entries=300,
            nprobe=4 if name == "lists" else None,
            code_bytes_per_key=0.0,
            resident_bytes_per_key=0.0,
            ms_per_query=0.0,
            recall_at_10=0.0,
            certificate={},
        )
        part = one_list(twins.tokens, twins.ids)
        hidden = Tombstones(Layout(root / "none"))
        engine = FaissSearch(index)
        found = PatchIndex(manifest, engine, EntryTable([part]), twins.layout.codes, hidden)
        made[name] = found, 10**6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrag_runtime.search.patch_index, "_SPARE", 2)
        yield made


def test_the_twins_are_what_the_tests_need(twins: CodeWorld, opened: dict[str, Any]) -> None:
    """Entries alone, a few identical ones, many; of one picture and of several; in two parts."""
    entries = expected_entries(twins, max_copies=MAX_COPIES)
    copies = [copies for _, copies in entries.values()]
    assert max(copies) > 20
    assert copies.count(1) > 10
    assert len(entries) < len(twins.ids) - 100
    index, _ = opened["copies"]
    assert index.manifest.entries == len(entries)
    assert index.count == len(twins.ids)
    assert opened["copies in parts"][0].manifest.entries == len(entries)
    assert opened["parts"][0].manifest.entries == 300


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 4, 25, 400]),
    excluding=st.sampled_from([None, 1, 3]),
    removing=st.booleans(),
    keeping=st.booleans(),
)
def test_what_is_hidden_is_made_up_for(
    twins: CodeWorld,
    opened: dict[str, tuple[PatchIndex, int]],
    kind: str,
    seed: int,
    k: int,
    excluding: int | None,
    removing: bool,
    keeping: bool,
) -> None:
    """Excluded a query, removed from the database, or outside the pictures to search in.

    An entry whose lowest id is hidden stays with another id and fewer copies; with all of them
    hidden it goes.
    """
    index, most = opened[kind]
    rng = np.random.default_rng(seed)
    pictures = np.unique(split_patch_ids(twins.ids)[0])
    asked = twins.keys[rng.integers(0, len(twins.ids), 3)]
    gone = np.sort(rng.choice(pictures, rng.integers(1, 8), replace=False)) if removing else None
    keep = np.sort(rng.choice(pictures, rng.integers(1, 9), replace=False)) if keeping else None
    exclude = None
    if excluding is not None:
        exclude = rng.choice(pictures, (3, excluding))
        exclude[rng.random(exclude.shape) < 0.2] = -1
    tombstones = index._tombstones
    assert tombstones is not None
    tombstones.ids = np.empty(0, np.int64) if gone is None else gone
    narrow = exclude[:, 0] if excluding == 1 and exclude is not None else exclude
    found = index.search(asked, k, exclude=narrow, keep=keep)
    for at in range(3):
        hidden = set(() if gone is None else gone.tolist())
        hidden |= set(() if exclude is None else exclude[at].tolist())
        hidden |= set(() if keep is None else pictures.tolist()) - set(
            () if keep is None else keep.tolist()
        )
        entries = expected_entries(twins, max_copies=most, hidden=frozenset(hidden))
        check_answer(found, at, twins, asked[at : at + 1], entries)


def test_an_entry_speaks_through_the_copies_that_may_be_shown(
    twins: CodeWorld, opened: dict[str, tuple[PatchIndex, int]]
) -> None:
    """Hide the picture of the lowest id, then one more, then all of them."""
    index, most = opened["copies"]
    assert index._tombstones is not None
    index._tombstones.ids = np.empty(0, np.int64)
    entries = expected_entries(twins, max_copies=most)
    lowest = max(entries, key=lambda identity: entries[identity][1])
    row, copies = entries[lowest]
    same = (twins.keys == twins.keys[row]).all(axis=1) & (twins.tokens == twins.tokens[row])
    every = np.sort(twins.ids[same])
    assert len(every) == copies
    pictures = np.unique(split_patch_ids(every)[0])
    for hidden in (pictures[:1], pictures[:2], pictures):
        found = index.search(twins.keys[row : row + 1], 300, exclude=hidden[None])
        left = every[~np.isin(split_patch_ids(every)[0], hidden)]
        here = np.isin(found.patch_ids[0], every)
        assert found.patch_ids[0][here].tolist() == left[:1].tolist()
        assert found.copies[0][here].tolist() == [len(left)][: len(left[:1])]


def test_the_probed_lists_are_the_nearest(tmp_path: Path) -> None:
    """nprobe is read back from faiss, and says which lists' entries are found."""
    world = make_codes(count=300)
    names = write_codes(tmp_path, world, 12, cuts=[200])
    centroids = np.load(tmp_path / CENTROIDS)
    opened = open_codes(tmp_path, world, names, nprobe=3)
    list_of = faiss.knn(world.vectors, centroids, 1)[1][:, 0]
    order = faiss.knn(world.vectors[:20], centroids, 12)[1]
    for nprobe in (3, 1, 12):
        opened.nprobe = nprobe
        engine = opened._engine
        assert isinstance(engine, CodebookSearch)
        assert [ivf.nprobe for ivf in engine._ivfs] == [nprobe] * 2
        found = opened.search(world.keys[:20], 300)
        for at in range(20):
            expected = world.ids[np.isin(list_of, order[at, :nprobe])]
            assert sorted(found.patch_ids[at, : found.count[at]]) == sorted(expected)
    for wrong in (0, 13):
        with pytest.raises(BadInputError, match=rf"{wrong} is outside 1\.\.12"):
            opened.nprobe = wrong
    with pytest.raises(BadInputError, match=r"13 is outside 1\.\.12"):
        open_codes(tmp_path, world, names, nprobe=13)


def test_empty_lists_and_parts_give_nothing(tmp_path: Path) -> None:
    """Two entries in eight lists, a part that lost all of its entries, and a part of none."""
    world = make_codes(count=100)
    [whole] = write_codes(tmp_path, world, 8)
    pictures = np.unique(split_patch_ids(world.ids)[0])
    few = np.sort(world.ids)[:2]
    part = ListPart.open(tmp_path / whole, world.layout.size)
    merge_parts(tmp_path / "none", [part], world.layout, max_copies=9, left_out=pictures)
    two = CodeWorld(world.layout, world.keys[:2], world.tokens[:2], few)
    folder = tmp_path / "two"
    folder.mkdir()
    (tmp_path / CENTROIDS).rename(folder / CENTROIDS)
    [name] = write_codes(folder, two, 8)
    (tmp_path / "none").rename(folder / "none")
    alone = open_codes(folder, two, ["none"])
    assert alone.search(world.keys[:3], 5).count.tolist() == [0, 0, 0]
    opened = open_codes(folder, two, ["none", name, "none"])
    found = opened.search(two.keys, 5)
    for at in range(2):
        check_answer(found, at, two, two.keys[at : at + 1], expected_entries(two))
    opened.nprobe = 1
    lists = faiss.knn(two.vectors, np.load(folder / CENTROIDS), 8)[1]
    empty = next(n for n in range(8) if n not in lists[:, 0])
    found = opened.search_vectors(np.load(folder / CENTROIDS)[[empty]], 5)
    assert found.count.tolist() == [0]
    assert (found.patch_ids == -1).all()


def test_a_graph_over_the_centroids_finds_nearly_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the exact coarse search finds at the same nprobe at least 95 %."""
    world = make_codes(count=4000, vocabulary=200)
    names = write_codes(tmp_path, world, 300)
    exact = open_codes(tmp_path, world, names, nprobe=16)
    centroids = np.load(tmp_path / CENTROIDS)
    write_graph(centroids, tmp_path / GRAPH)
    assert not (tmp_path / GRAPH).exists()
    monkeypatch.setattr(stages.index.coarse_lists, "_GRAPH_FROM", 300)
    write_graph(centroids, tmp_path / GRAPH)
    graph = open_codes(tmp_path, world, names, nprobe=16)
    asked = world.keys[::40]
    engine = graph._engine
    assert isinstance(engine, CodebookSearch)
    assert engine._coarse.hnsw.efSearch == 64
    shared = [
        len(set(one.tolist()) & set(other.tolist())) / 10
        for one, other in zip(
            exact.search(asked, 10).patch_ids, graph.search(asked, 10).patch_ids, strict=True
        )
    ]
    assert np.mean(shared) >= 0.95
    graph.nprobe = 100
    assert engine._coarse.hnsw.efSearch == 200
    assert engine.lists == 300


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """Codes cut short, a part of another number of lists, centroids of another dimension."""
    world = make_codes(count=200)
    [name] = write_codes(tmp_path, world, 6)
    (tmp_path / "short").mkdir()
    for path in (tmp_path / name).iterdir():
        (tmp_path / "short" / path.name).write_bytes(path.read_bytes())
    short = tmp_path / "short" / CODES
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(IncompatibleError, match=r"codes.bin has .* index again"):
        open_codes(tmp_path, world, ["short"])
    (tmp_path / "short" / STARTS).unlink()
    with pytest.raises(IncompatibleError, match="index again"):
        open_codes(tmp_path, world, ["short"])
    centroids = np.load(tmp_path / CENTROIDS)
    for wrong in (centroids[:-1], centroids[:, :-4]):
        np.save(tmp_path / CENTROIDS, wrong)
        with pytest.raises(IncompatibleError, match="lists and centroids disagree"):
            open_codes(tmp_path, world, [name])
    with pytest.raises(IncompatibleError, match="names no parts"):
        open_codes(tmp_path, world, [])
    (tmp_path / CENTROIDS).unlink()
    with pytest.raises(IncompatibleError, match="no readable centroids"):
        open_codes(tmp_path, world, [name])


def test_opening_and_searching_loads_neither_torch_nor_lance(tmp_path: Path) -> None:
    """A process that only searches, of a database that nothing was removed from, stays light."""
    world, layout = make_codes(count=90), Layout(tmp_path)
    folder = Path(layout.index("codes"))
    opened = open_codes(folder, world, write_codes(folder, world, 4))
    write_codebook(layout, world.layout.codes)
    opened.manifest.write(folder)
    grid = np.random.default_rng(0).integers(0, 24, (1, 7, 7)).astype(np.uint16)
    np.save(tmp_path / "grid.npy", grid)
    program = (
        "import sys, numpy as np; from arrag_runtime import Retriever;"
        " found = Retriever.open(sys.argv[1], k=5).at(np.load(sys.argv[2]), 3, 3);"
        " print(*found.patch_ids[0]); print(*sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "grid.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    found, modules = ran.stdout.splitlines()
    key = world.layout.keys.neighborhood.key_at(grid, 3, 3)
    assert key is not None
    assert found.split() == [str(one) for one in opened.search(key, 5).patch_ids[0]]
    assert "faiss" in modules.split()
    assert not {"torch", "transformers", "lance", "schemas", "stages"} & set(modules.split())
