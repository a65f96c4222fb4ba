"""Several indexes searched as one, against loops over the entries of all of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from arrag_runtime import PatchIndex, Retriever
from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.specs import key_spec
from arrag_runtime.search.index_group import IndexGroup
from tests.worlds.code_world import CodeWorld, expected_entries, make_codes, open_codes, write_codes

WEIGHTS = (1.0, 0.25, 3.0)


@pytest.fixture(scope="module")
def worlds() -> list[CodeWorld]:
    """Three databases of one codebook whose ids are the same, and which share some keys."""
    whole = make_codes(count=300)
    ids = np.sort(whole.ids)
    return [
        CodeWorld(whole.layout, whole.keys[rows], whole.tokens[rows], ids[: len(whole.ids[rows])])
        for rows in (slice(0, 150), slice(100, 290), slice(290, 300))
    ]


@pytest.fixture(scope="module")
def group(worlds: list[CodeWorld], tmp_path_factory: pytest.TempPathFactory) -> IndexGroup:
    opened = []
    for world in worlds:
        folder = tmp_path_factory.mktemp("one")
        opened.append(open_codes(folder, world, write_codes(folder, world, 5)))
    return IndexGroup(opened, WEIGHTS)


def vector_distances(world: CodeWorld, key: Ids) -> Ids:
    codes = world.layout.codes.astype(np.float64)
    distances: Ids = ((codes[world.keys] - codes[key]) ** 2).sum(axis=(1, 2))
    return distances


@pytest.mark.parametrize("k", [1, 12, 400])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_group_finds_the_nearest_of_all(
    worlds: list[CodeWorld], group: IndexGroup, k: int, filtered: bool
) -> None:
    """Each with the weight of its database; pictures are excluded and kept in every one."""
    assert group.count == sum(len(world.ids) for world in worlds)
    asked = worlds[1].keys[::40]
    keep: list[Ids | None] = [np.array([1, 2, 5]), None, np.array([1])]
    found = group.search(
        asked,
        k,
        exclude=np.full(len(asked), 2) if filtered else None,
        keep=keep if filtered else None,
    )
    for at, key in enumerate(asked):
        expected = []
        entries = []
        for origin, (world, kept) in enumerate(zip(worlds, keep, strict=True)):
            hidden = set(range(20)) - set(kept.tolist()) if kept is not None else set()
            shown = expected_entries(world, hidden=frozenset(hidden | {2} if filtered else ()))
            distances = vector_distances(world, key)
            entries.append(shown)
            expected += [(distances[row], origin) for row, _ in shown.values()]
        count = int(found.count[at])
        assert count == min(k, len(expected))
        nearest = [distance for distance, _ in sorted(expected)[:k]]
        assert np.allclose(found.distances[at, :count], nearest, atol=1e-5)
        seen = set()
        for place in range(count):
            origin, identity = int(found.origin[at, place]), int(found.patch_ids[at, place])
            row, copies = entries[origin][identity]
            seen.add((origin, identity))
            assert found.tokens[at, place] == worlds[origin].tokens[row]
            assert found.weights[at, place] == WEIGHTS[origin]
            assert found.copies[at, place] == copies
            true = vector_distances(worlds[origin], key)[row]
            assert abs(true - found.distances[at, place]) < 1e-5
        assert len(seen) == count
        assert (found.patch_ids[at, count:] == -1).all()
        assert np.isinf(found.distances[at, count:]).all()
        for padding in (found.tokens, found.weights, found.copies, found.origin):
            assert not padding[at, count:].any()


def test_a_group_of_one_is_that_one(group: IndexGroup, worlds: list[CodeWorld]) -> None:
    alone = group.indexes[1].search(worlds[0].keys[:9], 7)
    grouped = IndexGroup([group.indexes[1]]).search(worlds[0].keys[:9], 7)
    for name, values in vars(alone).items():
        assert np.array_equal(values, getattr(grouped, name)), name


def test_a_retriever_asks_all_of_them(group: IndexGroup) -> None:
    """With what is to be kept and excluded; the key is that of the position."""
    grids = np.random.default_rng(4).integers(0, 24, (2, 7, 7)).astype(np.uint16)
    key = group.manifest.keys.neighborhood.key_at(grids, 3, 2)
    assert key is not None
    keep: list[Ids | None] = [np.array([1, 2]), np.array([2]), None]
    found = Retriever(group, 30, keep=keep).at(grids, 3, 2, exclude=np.array([1, 2]))
    expected = group.search(key, 30, keep=keep, exclude=np.array([1, 2]))
    assert found is not None
    assert np.array_equal(found.patch_ids, expected.patch_ids)
    assert np.array_equal(found.origin, expected.origin)
    assert Retriever(group, 30).at(grids, 0, 2) is None


def test_what_does_not_belong_together_is_refused(
    group: IndexGroup, worlds: list[CodeWorld]
) -> None:
    """Other keys, another codebook, other offset weights; weights that make no sense."""
    first = group.indexes[0]

    def other(codes: npt.NDArray[Any] | None = None, **changes: object) -> PatchIndex:
        made = replace(first.manifest, name="other", **changes)  # type: ignore[arg-type]
        return PatchIndex(
            made, first._engine, first._entries, codes if codes is not None else first.codes
        )

    for index, message in (
        (
            other(keys=key_spec("causal-1", "zero", "codebook")),
            "causal-1-skip.*other.*causal-1-zero",
        ),
        (other(worlds[0].layout.codes[::-1]), "codes and other are of different codebooks"),
        (other(worlds[0].layout.codes[:-1]), "codes and other are of different codebooks"),
        (other(weights=(1.0, 2.0, 0.5, 0.5)), "weights of index codes .* of other"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            IndexGroup([first, index])
    for weights in ((1.0,), (1.0, -1.0), (0.0, 0.0)):
        with pytest.raises(BadInputError, match="weight"):
            IndexGroup([first, first], weights)
    with pytest.raises(BadInputError, match="0 databases"):
        IndexGroup([])
