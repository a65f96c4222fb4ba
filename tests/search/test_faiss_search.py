"""Searching flat and ivfpq indexes, against loops over every entry."""

from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from arrag_runtime import PatchIndex, Retriever
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import NO_IMAGE, split_patch_ids
from arrag_runtime.format.manifest import INDEX_FILE, IndexManifest
from arrag_runtime.format.specs import key_spec
from tests.worlds.patch_world import (
    IMAGES,
    KEYS,
    PER_IMAGE,
    World,
    build_index,
    check_neighbors,
    distances_by_loop,
    in_memory,
    make_world,
    train_with_faiss,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Three shards of pictures with two indexes: exact, and in four lists."""
    made = make_world(tmp_path_factory.mktemp("db"), 3, IMAGES // 3)
    build_index(made, "flat", kind="flat")
    train_with_faiss(made, "lists", "IVF4,PQ4x4")
    return made


@pytest.fixture(scope="module")
def flat(world: World) -> PatchIndex:
    """The exact index, opened."""
    return PatchIndex.open(world.layout.root, "flat")


@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("excluding", [False, True])
def test_a_flat_search_equals_a_loop(
    world: World, flat: PatchIndex, k: int, excluding: bool
) -> None:
    """Distances, ids and tokens of the k nearest; an excluded picture's entries are made up for."""
    chosen = np.arange(0, len(world.ids), 61)
    own = split_patch_ids(world.ids[chosen])[0]
    found = flat.search(world.keys[chosen], k, exclude=own if excluding else None)
    check_neighbors(found, world, k)
    assert (found.count == k).all()
    for row, at in enumerate(chosen):
        exclude = int(own[row]) if excluding else NO_IMAGE
        exact = distances_by_loop(world, world.vectors[at], exclude)
        assert np.allclose(found.distances[row], [d for d, _ in exact[:k]], atol=1e-5)
        near = {i for d, i in exact if d <= exact[k - 1][0] + 1e-5}
        assert set(found.patch_ids[row].tolist()) <= near


@pytest.mark.parametrize("k", [len(range(IMAGES)) * PER_IMAGE, 2000])
def test_more_neighbours_than_entries_are_padded(world: World, flat: PatchIndex, k: int) -> None:
    """Everything there is, then padding; without the picture that is excluded."""
    own = split_patch_ids(world.ids[:2])[0]
    found = flat.search(world.keys[:2], k, exclude=own)
    check_neighbors(found, world, k)
    assert found.count.tolist() == [len(world.ids) - PER_IMAGE] * 2
    assert not (split_patch_ids(found.patch_ids)[0] == own[:, None]).any()
    assert flat.search(world.keys[:2], k).count.tolist() == [len(world.ids)] * 2


def test_one_list_gives_what_it_holds_and_no_padding(world: World) -> None:
    """With nprobe 1 and k beyond any list: as many as are real, also when one is excluded."""
    opened = PatchIndex.open(world.layout.root, "lists")
    opened.nprobe = 1
    own = split_patch_ids(world.ids[::40])[0]
    for exclude in (None, own):
        found = opened.search(world.keys[::40], 700, exclude=exclude)
        check_neighbors(found, world, 700)
        assert (found.count > 0).all()
        assert (found.count < len(world.ids)).any()
        if exclude is not None:
            assert not (split_patch_ids(found.patch_ids)[0] == own[:, None]).any()


def test_an_empty_list_gives_no_neighbours(world: World) -> None:
    """A query whose only list is empty has a count of 0 and nothing but padding."""
    coarse = faiss.IndexFlatL2(16)
    centroids = np.stack([world.vectors[8], -world.vectors[8]])
    coarse.add(centroids)
    index = faiss.IndexIVFFlat(coarse, 16, 2)
    index.train(centroids)
    index.add(world.vectors[8:9])
    made = IndexManifest(
        name="lists",
        kind="ivfpq",
        index_key="IVF2,Flat",
        keys=KEYS,
        table_version=1,
        mark=1,
        count=1,
        entries=1,
        nprobe=1,
        code_bytes_per_key=64.0,
        resident_bytes_per_key=0.0,
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
    )
    alone = replace(world, ids=world.ids[8:9], tokens=world.tokens[8:9])
    opened = in_memory(made, index, alone)
    found = opened.search_vectors(centroids, 3)
    check_neighbors(found, world, 3)
    assert found.count.tolist() == [1, 0]


def test_a_retriever_searches_with_the_key_of_a_position(world: World, flat: PatchIndex) -> None:
    """Its answer for a position is the search for that key, whatever stands there and later."""
    retriever = Retriever.open(world.layout.root, k=7, index="flat")
    rng = np.random.default_rng(5)
    grids = rng.integers(0, 24, (3, 7, 7)).astype(np.uint16)
    for row, col in ((0, 0), (0, 3), (2, 0), (3, 6), (6, 3)):
        key = KEYS.neighborhood.key_at(grids, row, col)
        unfinished = grids.copy().reshape(3, -1)
        unfinished[:, row * 7 + col :] = 60000
        found = retriever.at(unfinished.reshape(3, 7, 7), row, col)
        assert key is not None
        assert found is not None
        expected = flat.search(key, 7)
        assert np.array_equal(found.patch_ids, expected.patch_ids)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.distances, expected.distances)
        assert np.array_equal(found.count, expected.count)


def test_a_retriever_has_no_answer_where_there_is_no_key(world: World, flat: PatchIndex) -> None:
    """With border skip the first row and the outer columns have no neighbours to ask for."""
    skipping = replace(flat.manifest, keys=key_spec("causal-1", "skip", "codebook"))
    index = faiss.read_index(str(Path(world.layout.index("flat")) / INDEX_FILE))
    retriever = Retriever(in_memory(skipping, index, world), 3)
    grids = np.zeros((1, 7, 7), np.uint16)
    for at in ((0, 3), (3, 0), (3, 6)):
        assert retriever.at(grids, *at) is None
    assert retriever.at(grids, 3, 3) is not None
    with pytest.raises(BadInputError, match=r"\(7, 0\).*7x7"):
        retriever.at(grids, 7, 0)


def test_searches_that_make_no_sense_are_refused(flat: PatchIndex) -> None:
    """A key of another length, a token outside the codebook, no neighbour asked for, no lists."""
    with pytest.raises(BadInputError, match="4 tokens, not 3"):
        flat.search(np.zeros((1, 3), np.uint16), 5)
    with pytest.raises(BadInputError, match="token 24"):
        flat.search(np.full((1, 4), 24, np.uint16), 5)
    with pytest.raises(BadInputError, match="k is 0"):
        flat.search(np.zeros((1, 4), np.uint16), 0)
    with pytest.raises(BadInputError, match="no lists"):
        flat.nprobe = 4
    assert flat.nprobe is None
