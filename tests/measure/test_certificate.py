"""Certificates: recall as a loop counts it, and the smallest nprobe that reaches a target."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import NO_IMAGE, Ids, split_patch_ids
from arrag_runtime.format.specs import key_vectors
from arrag_runtime.search.neighbors import Neighbors
from stages.measure.certificate import Certificate, Target, certify, recall_at
from stages.measure.exact_search import Queries, exact_search, true_distances
from tests.worlds.patch_world import CODES, World, make_world
from tests.worlds.plain_search import PlainSearch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Few codes, so that many keys are equally near."""
    return make_world(tmp_path_factory.mktemp("db"), 3, 8)


@pytest.fixture(scope="module")
def queries(world: World) -> Queries:
    """Keys of the world, each with its own picture excluded."""
    at = np.arange(0, len(world.ids), 13)
    images = split_patch_ids(world.ids[at])[0]
    return Queries(world.keys[at], world.tokens[at], images, images[:, None], "some of its own")


@pytest.fixture(scope="module")
def exact(world: World, queries: Queries) -> Neighbors:
    return exact_search(world.table.blocks(), CODES, queries, 2048)


KEYS = {"flat": "Flat", "lists": "IVF8,Flat", "quantised": "IVF8,PQ2x2"}


@pytest.fixture(scope="module")
def indexes(world: World) -> dict[str, PlainSearch]:
    """Exact; exact distances in eight lists; product-quantised in eight lists."""
    return {name: PlainSearch(world, key) for name, key in KEYS.items()}


@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([1, 3, 10, 40]))
def test_recall_equals_a_loop(seed: int, k: int) -> None:
    """Ties at the k-th distance are hits; where few can be found, all of those are the k."""
    rng = np.random.default_rng(seed)
    known = rng.integers(0, 30, 6)
    exact_distances = np.sort(rng.integers(0, 8, (6, 30)) / 4, axis=1).astype(np.float32)
    exact_distances[np.arange(30) >= known[:, None]] = np.inf
    tokens = np.zeros((6, 30), np.uint16)
    rows = np.zeros((6, 30), np.int64)
    exact = Neighbors.of(tokens, exact_distances, rows, known)
    count = rng.integers(0, 30, 6)
    answers = np.sort(rng.integers(0, 12, (6, 30)) / 4, axis=1).astype(np.float32)
    answers += rng.choice([0, 5e-6], (6, 30)).astype(np.float32)
    found = recall_at(answers, count, exact, k)
    for row in range(6):
        reachable = min(k, int(known[row]))
        if not reachable:
            assert found[row] == 1
            continue
        limit = exact_distances[row, reachable - 1] + 1e-5
        hits = sum(answers[row, at] <= limit for at in range(min(k, int(count[row]))))
        assert found[row] == pytest.approx(min(hits, reachable) / reachable)


def test_an_exact_index_is_certified_so(
    world: World, indexes: dict[str, PlainSearch], queries: Queries, exact: Neighbors
) -> None:
    """No list, no nprobe; recall 1 at every k, the same distribution, the same distances."""
    made = certify(indexes["flat"], queries, exact, Target())
    assert made.reached
    assert made.chosen.nprobe is None
    assert list(made.chosen.recall) == ["1", "10", "100", "2048"]
    assert set(made.chosen.recall.values()) == set(made.chosen.lowest_tenth.values()) == {1.0}
    assert made.chosen.total_variation < 1e-5
    assert made.chosen.distance_ratio.values() == pytest.approx([1.0] * 4)
    assert all(ms > 0 for times in made.ms_per_query.values() for ms in times.values())
    assert "exhaustive reaches recall@10 of 0.95" in made.to_text()
    assert "some of its own" in made.to_text()


@pytest.mark.parametrize("target", ["0.5", "0.8", "0.95@100", "1"])
def test_nprobe_is_the_smallest_that_reaches_the_target(
    indexes: dict[str, PlainSearch], queries: Queries, exact: Neighbors, target: str
) -> None:
    """As trying every one says; the index is left at it; recall grows with the lists."""
    index, wanted = indexes["lists"], Target.parse(target)
    made = certify(index, queries, exact, wanted)
    recalls = []
    for nprobe in range(1, 9):
        index.nprobe = nprobe
        answer = index.search(queries.keys, 2048, exclude=queries.exclude)
        recalls.append(recall_at(answer.distances, answer.count, exact, wanted.k).mean())
    smallest = 1 + next(at for at, recall in enumerate(recalls) if recall >= wanted.recall)
    assert made.reached
    assert made.chosen.nprobe == smallest
    assert made.chosen.recall[str(wanted.k)] == pytest.approx(recalls[smallest - 1])
    tried = [one.nprobe or 0 for one in made.tried]
    assert tried == sorted(tried)
    shown = [one.recall["10"] for one in made.tried]
    assert shown == sorted(shown)
    again = certify(index, queries, exact, wanted)
    assert index.nprobe == smallest
    assert again.chosen.recall == made.chosen.recall


def test_a_target_out_of_reach_is_admitted(
    world: World, indexes: dict[str, PlainSearch], queries: Queries, exact: Neighbors
) -> None:
    """A coarse quantiser; true distances decide, the index's own are far off."""
    index = indexes["quantised"]

    def distances_of(ids: Ids) -> npt.NDArray[np.float32]:
        return true_distances(world.table.blocks(), CODES, queries, ids)

    made = certify(index, queries, exact, Target(0.99), distances_of=distances_of)
    assert not made.reached
    best = max(one.recall["10"] for one in made.tried)
    assert made.chosen.recall["10"] >= best - 0.005
    assert all(one.recall["10"] < best - 0.005 for one in made.tried if _below(one, made))
    assert index.nprobe == made.chosen.nprobe
    assert "does not reach recall@10 of 0.99" in made.to_text()
    assert "no nprobe reaches it" in made.to_text()
    assert made.chosen.distance_ratio["10"] > 1.01
    assert 0 < made.chosen.total_variation < 1
    # All lists hold every entry, so all 2,048 are found, whatever their order.
    index.nprobe = 8
    answer = index.search(queries.keys, 10, exclude=queries.exclude)
    hits = recall_at(distances_of(answer.patch_ids), answer.count, exact, 10)
    by_vectors = ((key_vectors(queries.keys, CODES)[:, None] - _vectors(world, answer)) ** 2).sum(2)
    assert hits.tolist() == recall_at(by_vectors, answer.count, exact, 10).tolist()


def _below(one: Any, made: Certificate) -> bool:
    return bool(one.nprobe < made.chosen.nprobe)


def _vectors(world: World, answer: Any) -> Any:
    rows = {identity: row for row, identity in enumerate(world.ids.tolist())}
    at = np.array([[rows[i] for i in ids] for ids in answer.patch_ids.tolist()])
    return world.vectors[at]


def test_held_out_queries_exclude_nothing(world: World, queries: Queries) -> None:
    """With no picture to leave out, searches are asked to exclude none."""
    everyone = replace(queries, exclude=np.full((len(queries.keys), 2), NO_IMAGE))
    exact = exact_search(world.table.blocks(), CODES, everyone, 100)
    index = PlainSearch(world, "Flat")
    made = certify(index, everyone, exact, Target())
    assert index.asked
    assert not any(exclude is not None for exclude in index.asked)
    assert list(made.chosen.recall) == ["1", "10", "100"]


def test_certificates_become_json(
    world: World, indexes: dict[str, PlainSearch], queries: Queries, exact: Neighbors
) -> None:
    """And say which nprobe is tried while they are made."""
    seen: list[int | None] = []
    made = certify(
        indexes["lists"], queries, exact, Target(1.0, 2048), threads=3, progress=seen.append
    )
    fields = asdict(made)
    assert sorted(n for n in seen if n) == [one["nprobe"] for one in fields["tried"]]
    assert fields["chosen"]["nprobe"] == made.chosen.nprobe == 8
    assert (fields["threads"], fields["merge"], fields["temperature"]) == (3, "nearest", 0.6)
    assert fields["target"] == {"recall": 1.0, "k": 2048}


@pytest.mark.parametrize(
    ("text", "recall", "k"), [("0.95", 0.95, 10), ("0.9@2048", 0.9, 2048), ("1", 1.0, 10)]
)
def test_targets_as_typed(text: str, recall: float, k: int) -> None:
    assert Target.parse(text) == Target(recall, k)


@pytest.mark.parametrize("text", ["", "high", "0.9@x", "0", "1.2", "0.5@0", "0.5@4096"])
def test_targets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="target recall"):
        Target.parse(text)


def test_a_deeper_target_than_the_exact_neighbours_is_refused(
    world: World, indexes: dict[str, PlainSearch], queries: Queries
) -> None:
    shallow = exact_search(world.table.blocks(), CODES, queries, 5)
    with pytest.raises(BadInputError, match="up to k 10, not 5"):
        certify(indexes["flat"], queries, shallow, Target())
