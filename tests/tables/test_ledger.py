"""The ledger's rows, one kind after the other, and what they say together."""

from dataclasses import replace
from typing import Any

from schemas.records import RecordedShard, Shard
from stages.tables.ledger import LedgerState, ledger_state

Row = dict[str, Any]
ONE, TWO = Shard("links", "1" * 16, ("a", "b")), Shard("folder", "2" * 16, ("c",))
NOTHING = ledger_state([])


def row(state: str, shard: Shard | None = None, attempt: int = 0, **columns: Any) -> Row:
    """A row of the ledger; columns that it does not have are null."""
    empty = ("members", "fragments", "inputs", "images", "heldout", "patches", "rejects")
    about = {"shard": shard.id if shard else "", "source": shard.source if shard else ""}
    return dict.fromkeys(empty) | about | {"state": state, "attempt": attempt} | columns


def planned(shard: Shard) -> Row:
    return row("planned", shard, members=list(shard.members))


def planned_again(shard: Shard, attempt: int, *rows: int) -> Row:
    return row("planned", shard, attempt, members=list(map(str, rows)))


def done(shard: Shard, attempt: int = 1, *rows: int, inputs: int = 0, **counts: Any) -> Row:
    members = list(map(str, rows)) or None
    return row("done", shard, attempt, members=members, inputs=inputs, **counts)


FIRST = [
    planned(ONE),
    planned(TWO),
    done(ONE, inputs=5, images=3, heldout=1, patches=20, rejects=2),
]


def test_an_empty_ledger_says_nothing() -> None:
    totals = dict.fromkeys(("inputs", "images", "heldout", "patches", "rejects", "removed"), 0)
    assert LedgerState((), {}, totals) == NOTHING
    assert NOTHING.done == frozenset()


def test_a_planned_shard_is_recorded_once_as_it_was_first() -> None:
    state = ledger_state([planned(ONE), planned(Shard("links", ONE.id, ("other",)))])
    assert state.recorded == (RecordedShard(ONE),)
    assert (state.done, state.attempts, state.unfinished) == (frozenset(), {}, {})
    assert state.totals == NOTHING.totals


def test_a_done_shard_counts() -> None:
    state = ledger_state(FIRST)
    assert state.recorded == (RecordedShard(ONE, 5), RecordedShard(TWO))
    assert state.done == {ONE.id}
    assert state.attempts == {ONE.id: 1}
    assert state.taken == {}
    counts = {"inputs": 5, "images": 3, "heldout": 1, "patches": 20, "rejects": 2}
    assert state.totals == counts | {"removed": 0}
    assert state.by_source == {"links": counts, "folder": dict.fromkeys(counts, 0)}


def test_the_highest_fragment_of_each_table_is_its_mark() -> None:
    rows = [
        *FIRST,
        done(TWO, inputs=1, fragments=[("patches", 7), ("images", 3)]),
        row("compacted", fragments=[("patches", 4), ("rejects", 0)]),
    ]
    assert ledger_state(rows).marks == {"patches": 7, "images": 3, "rejects": 0}


def test_a_later_attempt_that_is_planned_is_unfinished() -> None:
    """One that was killed is planned again under its number; rows of both may be about."""
    once = [*FIRST, planned_again(ONE, 2, 1, 4)]
    assert ledger_state(once).unfinished == {ONE.id: {1, 4}}
    twice = [*once, planned_again(ONE, 2, 2)]
    assert ledger_state(twice) == replace(
        ledger_state(FIRST), unfinished={ONE.id: frozenset({1, 2, 4})}
    )


def test_a_later_attempt_that_is_done_takes_its_rows() -> None:
    """It brings no inputs; of a row that was taken twice the last attempt counts."""
    second = [
        *FIRST,
        planned_again(ONE, 2, 1, 4),
        done(ONE, 2, 1, 4, images=1, heldout=0, patches=9, rejects=-1),
    ]
    state = ledger_state(second)
    assert state.recorded[0] == RecordedShard(ONE, 5)
    assert (state.attempts, state.unfinished) == ({ONE.id: 2}, {})
    assert state.taken == {ONE.id: {1: 2, 4: 2}}
    assert (state.totals["images"], state.totals["rejects"]) == (4, 1)
    third = ledger_state([*second, planned_again(ONE, 3, 4), done(ONE, 3, 4, rejects=0)])
    assert third.taken == {ONE.id: {1: 2, 4: 3}}
    assert third.attempts == {ONE.id: 3}


def test_an_open_attempt_beside_one_that_is_done_stays_open() -> None:
    rows = [*FIRST, planned_again(ONE, 2, 1), done(ONE, 2, 1), planned_again(ONE, 3, 4)]
    assert ledger_state(rows).unfinished == {ONE.id: {4}}


def test_what_was_removed_is_taken_off_and_counted() -> None:
    lost = row("removed", ONE, members=["9"], images=-1, heldout=0, patches=-9, inputs=0, rejects=0)
    state = ledger_state([*FIRST, lost])
    assert state.totals["removed"] == 1
    assert (state.totals["images"], state.totals["patches"]) == (2, 11)
    assert state.by_source["links"]["images"] == 2
    assert state.recorded == ledger_state(FIRST).recorded


def test_a_compaction_is_under_way_until_it_ended() -> None:
    """That is, while more rows begin one than end one."""
    begun = [*FIRST, row("compacting")]
    assert ledger_state(begun).compacting
    assert not ledger_state([*begun, row("compacted")]).compacting
    assert ledger_state([*begun, row("compacting"), row("compacted")]).compacting
    assert "" not in ledger_state(begun).by_source
