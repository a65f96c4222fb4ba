"""Rejects that are tried again, in the ledger: sums, open rejects, and what a kill leaves."""

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from arrag_runtime.format.errors import IncompatibleError
from arrag_runtime.format.ids import image_id
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.manifest import Layout
from pipeline.building.plan_shards import next_attempts, open_rejects
from schemas.records import Attempt, RecordedShard, Shard
from schemas.tables import REJECTS_SCHEMA, images_schema, patches_schema
from stages.tables.committer import (
    IMAGES,
    PATCHES,
    REJECTS,
    Committer,
    ShardResult,
    clean_versions,
    create_tables,
    table_paths,
    write_fragments,
)
from stages.tables.ledger import LedgerState, read_ledger
from tests.worlds.patch_world import KEYS, SPEC

ONE, TWO = Shard("links", f"{1 << 40:016x}", ("a",)), Shard("links", f"{2 << 40:016x}", ("b",))


def result(
    layout: Layout, shard: Shard, attempt: int, images: list[int], rejects: dict[int, str]
) -> ShardResult:
    """What a worker makes of these rows: fragments of all three tables, uncommitted."""
    ids = np.array([image_id(shard.id, row) for row in images], np.int64)
    empty = {f.name: [None] * len(images) for f in images_schema(SPEC, latents=False)}
    text = {n: [""] * len(images) for n in ("key", "sha256", "split")}
    text |= {"source": ["links"] * len(images), "shard": [shard.id] * len(images)}
    sizes = {"width": [1] * len(images), "height": [1] * len(images), "image_id": ids}
    grids = fixed_lists(np.zeros((len(images), SPEC.positions), np.uint16))
    keys = fixed_lists(np.zeros((len(images), KEYS.neighborhood.size), np.uint16))
    tables = {
        IMAGES: pa.table(
            empty | text | sizes | {"tokens": grids}, schema=images_schema(SPEC, latents=False)
        ),
        PATCHES: pa.table(
            [pa.array(ids << 10), keys, pa.array([0] * len(images), pa.uint16())],
            schema=patches_schema(SPEC, KEYS),
        ),
        REJECTS: pa.Table.from_pylist(
            [
                {"shard": shard.id, "attempt": attempt, "row": row, "key": str(row)}
                | {"stage": "download", "reason": reason, "detail": ""}
                for row, reason in rejects.items()
            ],
            schema=REJECTS_SCHEMA,
        ),
    }
    paths = table_paths(layout, KEYS)
    retried = sorted([*images, *rejects]) if attempt > 1 else []
    counts: dict[str, int] = {}
    for reason in rejects.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ShardResult(
        shard=shard.id,
        source="links",
        attempt=attempt,
        inputs=0 if retried else len(images) + len(rejects),
        images=len(images),
        heldout=0,
        patches=len(images),
        rejects=counts,
        fragments={name: write_fragments(paths[name], tables[name]) for name in tables},
        retried=retried,
    )


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Two shards are done: one with two rejects of three rows, one with none."""
    made = Layout(tmp_path / "db")
    create_tables(made, SPEC, KEYS)
    committer = Committer(made, KEYS)
    committer.plan([ONE, TWO])
    committer.commit(result(made, ONE, 1, [0, 3], {1: "dns", 2: "timeout", 4: "dns"}))
    committer.commit(result(made, TWO, 1, [0, 1], {}))
    return made


def rejected(layout: Layout, state: LedgerState) -> dict[int, str]:
    """The open rejects of shard one by their rows."""
    rows = open_rejects(layout.rejects, state, ["reason"]).to_pylist()
    assert {row["shard"] for row in rows} <= {ONE.id}
    assert len({row["row"] for row in rows}) == len(rows)
    return {row["row"]: row["reason"] for row in rows}


def assert_adds_up(layout: Layout, inputs: int) -> LedgerState:
    state = read_ledger(layout)
    totals = state.totals
    assert totals["inputs"] == inputs == totals["images"] + totals["rejects"]
    assert totals["rejects"] == len(rejected(layout, state))
    assert totals["images"] == lance.dataset(layout.images).count_rows()
    return state


def test_a_retry_takes_just_the_rejects_with_these_reasons(layout: Layout) -> None:
    state = assert_adds_up(layout, 7)
    assert next_attempts(layout, state, "links", ["dns"]) == (Attempt(ONE, 2, (1, 4)),)
    assert next_attempts(layout, state, "links", ["timeout", "dns"]) == (
        Attempt(ONE, 2, (1, 2, 4)),
    )
    assert next_attempts(layout, state, "links", ["too-large"]) == ()
    assert next_attempts(layout, state, "other", ["dns"]) == ()


def test_sums_hold_and_closed_rejects_stay_closed(layout: Layout) -> None:
    """Row 1 is rejected again for another reason, row 4 becomes a picture, then row 1 too."""
    committer = Committer(layout, KEYS)
    committer.plan_again([Attempt(ONE, 2, (1, 4))])
    committer.commit(result(layout, ONE, 2, [4], {1: "http-404"}))
    state = assert_adds_up(layout, 7)
    assert rejected(layout, state) == {1: "http-404", 2: "timeout"}
    assert RecordedShard(ONE, 5) in state.recorded
    assert next_attempts(layout, state, "links", ["dns"]) == ()
    (again,) = next_attempts(layout, state, "links", ["http-404"])
    assert again == Attempt(ONE, 3, (1,))
    committer.plan_again([again])
    committer.commit(result(layout, ONE, 3, [1], {}))
    state = assert_adds_up(layout, 7)
    assert rejected(layout, state) == {2: "timeout"}
    assert state.totals["images"] == 6
    assert lance.dataset(layout.rejects).count_rows() == 4


def test_a_result_that_does_not_add_up_is_not_committed(layout: Layout) -> None:
    wrong = result(layout, ONE, 2, [4], {1: "dns"})
    lost = ShardResult(**{**vars(wrong), "retried": [1, 2, 4]})
    with pytest.raises(IncompatibleError, match="0 inputs and 3 rows again, but 1 images and 1"):
        Committer(layout, KEYS).commit(lost)
    assert_adds_up(layout, 7)


@pytest.mark.parametrize(
    "reached", [(), (PATCHES,), (PATCHES, REJECTS), (PATCHES, REJECTS, IMAGES)]
)
def test_what_a_killed_retry_committed_is_dropped(layout: Layout, reached: tuple[str, ...]) -> None:
    """Although its shard is done: the rows that it took are known from its plan."""
    committer = Committer(layout, KEYS)
    committer.plan_again([Attempt(ONE, 2, (1, 4))])
    killed = result(layout, ONE, 2, [4], {1: "http-404"})
    for name in reached:
        committer._append(name, killed.fragments[name])
    state = read_ledger(layout)
    assert rejected(layout, state) == {1: "dns", 2: "timeout", 4: "dns"}
    assert Committer(layout, KEYS).recover(state) == len(reached)
    assert_adds_up(layout, 7)
    assert Committer(layout, KEYS).recover(state) == 0
    committer = Committer(layout, KEYS)
    (again,) = next_attempts(layout, read_ledger(layout), "links", ["dns"])
    assert again == Attempt(ONE, 2, (1, 4))
    committer.plan_again([again])
    committer.commit(result(layout, ONE, 2, [1, 4], {}))
    state = assert_adds_up(layout, 7)
    assert state.unfinished == {}
    assert Committer(layout, KEYS).recover(state) == 0
    assert_adds_up(layout, 7)


def test_a_killed_retry_of_other_rows_leaves_later_ones_alone(layout: Layout) -> None:
    """A plan that was never carried out is superseded by the next of its number."""
    committer = Committer(layout, KEYS)
    committer.plan_again([Attempt(ONE, 2, (1, 2, 4))])
    Committer(layout, KEYS).recover(read_ledger(layout))
    committer = Committer(layout, KEYS)
    committer.plan_again([Attempt(ONE, 2, (1,))])
    committer.commit(result(layout, ONE, 2, [1], {}))
    state = assert_adds_up(layout, 7)
    assert rejected(layout, state) == {2: "timeout", 4: "dns"}
    assert Committer(layout, KEYS).recover(state) == 0


def test_old_versions_go_now_and_then(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some stay for those who just read them; whoever builds may have it done elsewhere."""
    monkeypatch.setattr("stages.tables.committer.CLEAN_EVERY", 4)
    monkeypatch.setattr("stages.tables.committer.KEPT_VERSIONS", 3)
    asked: list[list[str]] = []
    tables = [*table_paths(layout, KEYS).values(), layout.ledger]
    for clean in (lambda paths: asked.append(list(paths)), clean_versions):
        committer = Committer(layout, KEYS, clean=clean)
        before = len(lance.dataset(layout.images).versions())
        for number in range(4):
            shard = Shard("links", f"{number + 10 * before << 40:016x}", ("m",))
            committer.plan([shard])
            committer.commit(result(layout, shard, 1, [0], {}))
        if clean is not clean_versions:
            assert [sorted(paths) for paths in asked] == [sorted(tables)]
            assert len(lance.dataset(layout.images).versions()) == before + 4
    assert [len(lance.dataset(path).versions()) for path in tables] == [3, 2, 3, 3]
    assert lance.dataset(layout.images).count_rows() == 4 + 8


def test_a_compacted_table_is_left_alone(layout: Layout) -> None:
    """Its fragments are newer than the ledger's marks, and hold rows of finished attempts."""
    committer = Committer(layout, KEYS)
    committer.plan_again([Attempt(ONE, 2, (1, 4))])
    for path in table_paths(layout, KEYS).values():
        lance.dataset(path).optimize.compact_files()
    assert lance.dataset(layout.images).get_fragments()[0].fragment_id > 1
    assert Committer(layout, KEYS).recover(read_ledger(layout)) == 0
    assert_adds_up(layout, 7)
