"""Filling and merging lists: however the keys are cut into parts, the bytes are the same."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stages.index.fill_lists
from arrag_runtime.format.ids import split_patch_ids
from arrag_runtime.format.inverted_lists import Entries, ListPart, PartWriter
from arrag_runtime.format.patches import PatchBlock
from arrag_runtime.format.specs import Floats
from stages.index.coarse_lists import ListFinder, train_centroids
from stages.index.fill_lists import append_parts, collapse, expanded, fill_part, merge_parts
from tests.worlds.code_world import CodeWorld, make_codes

LISTS = 7
MOST = 4


@pytest.fixture(scope="module", params=["random", "duplicated", "missing"])
def world(request: pytest.FixtureRequest) -> CodeWorld:
    """Keys that are all different, that repeat many times, or of which neighbours are missing."""
    if request.param == "missing":
        return make_codes("surround-1", "zero", 16, count=350)
    return make_codes(count=350, distinct=40 if request.param == "duplicated" else None)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging goes through several groups of lists."""
    monkeypatch.setattr(stages.index.fill_lists, "MERGE_ENTRIES", 80)


def fill_keys(
    folder: Path, blocks: Iterable[PatchBlock], centroids: Floats, world: CodeWorld
) -> None:
    """Fill a part with blocks of the world's entries, with room for a few more."""
    room = len(world.ids) + 3
    fill_part(folder, blocks, ListFinder(centroids), world.layout, lists=LISTS, keys=room)


def fill(folder: Path, world: CodeWorld, cuts: Sequence[int]) -> list[ListPart]:
    """One part for each piece of the entries."""
    centroids = train_centroids(world.vectors, LISTS, seed=0)
    parts = []
    for number, block in enumerate(world.blocks(cuts)):
        place = folder / f"fill-{number}-of-{len(cuts)}"
        fill_keys(place, [block], centroids, world)
        parts.append(ListPart.open(place, world.layout.size))
    return parts


def merge(
    folder: Path,
    world: CodeWorld,
    parts: Sequence[ListPart],
    most: int = MOST,
    left_out: object = None,
    lists: tuple[int, int] | None = None,
) -> ListPart:
    merge_parts(folder, parts, world.layout, max_copies=most, left_out=left_out, lists=lists)  # type: ignore[arg-type]
    return ListPart.open(folder, world.layout.size)


def assert_same_bytes(one: ListPart, other: ListPart) -> None:
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in other.folder.iterdir())
    assert len(names) == 7
    for name in names:
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes(), name


def test_parts_make_the_bytes_of_the_whole(world: CodeWorld, tmp_path: Path) -> None:
    """One part, two, five with an empty one; merged at once, in any order, or one after another."""
    whole = merge(tmp_path / "whole", world, fill(tmp_path, world, []))
    assert whole.keys == len(world.ids)
    for cuts in ([100], [3, 3, 90, 340]):
        parts = fill(tmp_path, world, cuts)
        assert_same_bytes(merge(tmp_path / "at once", world, parts), whole)
        assert_same_bytes(merge(tmp_path / "backwards", world, parts[::-1]), whole)
        step = merge(tmp_path / "step 0", world, parts[:1], most=1)
        for number, part in enumerate(parts[1:], start=1):
            most = MOST if number == len(parts) - 1 else 1
            step = merge(tmp_path / f"step {number}", world, [step, part], most=most)
        assert_same_bytes(step, whole)


def test_slices_of_lists_make_the_bytes_of_the_whole(world: CodeWorld, tmp_path: Path) -> None:
    parts = fill(tmp_path, world, [120, 200])
    whole = merge(tmp_path / "whole", world, parts)
    slices = [
        merge(tmp_path / f"slice {first} to {last}", world, parts, lists=(first, last))
        for first, last in ((0, 3), (3, 3), (3, 4), (4, LISTS))
    ]
    append_parts(tmp_path / "together", slices)
    assert_same_bytes(ListPart.open(tmp_path / "together", world.layout.size), whole)


def test_the_order_in_which_keys_come_makes_no_difference(world: CodeWorld, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(len(world.ids))
    shuffled = CodeWorld(world.layout, world.keys[order], world.tokens[order], world.ids[order])
    centroids = train_centroids(world.vectors, LISTS, seed=0)
    fill_keys(tmp_path / "fill", shuffled.blocks([11, 300]), centroids, world)
    [whole] = fill(tmp_path, world, [])
    one = merge(tmp_path / "a", world, [ListPart.open(tmp_path / "fill", world.layout.size)])
    assert_same_bytes(one, merge(tmp_path / "b", world, [whole]))


def test_pictures_that_are_left_out_leave_nothing(world: CodeWorld, tmp_path: Path) -> None:
    """As if their keys had never been in any part, copies and all."""
    gone = np.array([1, 2, 9])
    here = ~np.isin(split_patch_ids(world.ids)[0], gone)
    rest = CodeWorld(world.layout, world.keys[here], world.tokens[here], world.ids[here])
    centroids = train_centroids(world.vectors, LISTS, seed=0)
    fill_keys(tmp_path / "rest", rest.blocks([]), centroids, world)
    alone = merge(tmp_path / "a", world, [ListPart.open(tmp_path / "rest", world.layout.size)])
    parts = fill(tmp_path, world, [100])
    assert_same_bytes(merge(tmp_path / "b", world, parts, left_out=gone), alone)
    # Also out of entries that were stored once for many.
    merged = merge(tmp_path / "merged", world, parts)
    assert_same_bytes(merge(tmp_path / "c", world, [merged], left_out=gone), alone)


def test_entries_are_in_order_and_none_is_lost(world: CodeWorld, tmp_path: Path) -> None:
    """By list, key, token and id; every id is kept, the lowest one in front."""
    part = merge(tmp_path / "part", world, fill(tmp_path, world, [200]))
    assert sorted(part.every_id().tolist()) == sorted(world.ids.tolist())
    row_of = {identity: row for row, identity in enumerate(world.ids.tolist())}
    list_of = ListFinder(train_centroids(world.vectors, LISTS, seed=0))(world.vectors)
    held = []
    for number in range(LISTS):
        entries = expanded(part, number, number + 1)
        assert (entries.lists == number).all()
        for identity, token in zip(
            entries.patch_ids.tolist(), entries.next_tokens.tolist(), strict=True
        ):
            row = row_of[identity]
            assert token == world.tokens[row]
            held.append((int(list_of[row]), tuple(world.keys[row].tolist()), token, identity))
        assert {entry[0] for entry in held} <= set(range(number + 1))
    assert held == sorted(held)
    counts = np.diff(part.copies_start)
    assert (counts > MOST).all()
    for at, start, count in zip(part.copies_at, part.copies_start, counts, strict=False):
        copies = part.copies_ids[start : start + count]
        assert part.patch_ids[at] == copies[0]
        assert (np.diff(copies) > 0).all()


@given(
    drawn=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)), max_size=30),
    most=st.integers(1, 4),
)
def test_identical_entries_beyond_a_number_become_one(
    drawn: list[tuple[int, int, int]], most: int
) -> None:
    """Against a dictionary; entries of another list are others, whatever their codes."""
    rows = np.array(sorted(drawn), np.int64).reshape(-1, 3)
    ids = np.arange(len(rows), dtype=np.int64)
    ordered = Entries(rows[:, 0], rows[:, 1:2].astype(np.uint8), rows[:, 2].astype(np.uint16), ids)
    groups: dict[tuple[int, ...], list[int]] = {}
    for identity, row in enumerate(rows.tolist()):
        groups.setdefault(tuple(row), []).append(identity)
    expected = []
    for members in groups.values():
        expected += [members] if len(members) > most else [[member] for member in members]
    entries, copies, copies_ids = collapse(ordered, most)
    assert copies.tolist() == [len(members) for members in expected]
    assert entries.patch_ids.tolist() == [members[0] for members in expected]
    every = [member for members in expected if len(members) > 1 for member in members]
    assert copies_ids.tolist() == every
    assert entries.lists.tolist() == [int(rows[members[0], 0]) for members in expected]


def test_a_part_that_fails_leaves_nothing(world: CodeWorld, tmp_path: Path) -> None:
    """Neither a folder nor the draft of one; an older part of the name stays."""
    [older] = fill(tmp_path, world, [])
    before = {path.name: path.read_bytes() for path in older.folder.iterdir()}
    with pytest.raises(RuntimeError, match="disk"), PartWriter(older.folder, LISTS):
        raise RuntimeError("no space left on the disk")
    assert [path.name for path in tmp_path.iterdir()] == [older.folder.name]
    assert {path.name: path.read_bytes() for path in older.folder.iterdir()} == before
