"""What a build has to do: shards that the ledger lacks, or rejects that are to be tried again.

`plan_shards` takes a source's shards without those that are done. To try rejects again,
`next_attempts` finds the open ones (`open_rejects`) in the tables, and `plan_attempts` looks for
their shards in the source as it is now. Nothing is written here.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lance
import pyarrow as pa
import pyarrow.compute as pc

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import SHARD_BITS, shard_number
from arrag_runtime.format.manifest import Layout
from schemas.records import REASONS, Attempt, RecordedShard, Shard
from stages.sources.reading.source_kind import Source
from stages.tables.ledger import LedgerState


@dataclass(frozen=True)
class Plan:
    """What a build is going to do."""

    fresh: tuple[Shard, ...]
    """Shards to record in the ledger first."""
    todo: tuple[Attempt, ...]
    """What is to run, in order, each on a shard of its own."""
    skipped: int
    """How many shards are done already."""
    notes: tuple[str, ...]


def plan_shards(source: Source, state: LedgerState) -> Plan:
    """The shards of `source` that are not done. Raises BadInputError when two ids collide."""
    recorded = [r for r in state.recorded if r.shard.source == source.name]
    listing = source.listing(recorded)
    planned = {r.shard.id for r in state.recorded}
    fresh = tuple(shard for shard in listing.shards if shard.id not in planned)
    todo = tuple(Attempt(shard) for shard in listing.shards if shard.id not in state.done)
    _require_distinct(state.recorded, fresh)
    done = sum(r.inputs is not None for r in recorded)
    return Plan(fresh, todo, done, tuple(listing.notes))


def _require_distinct(recorded: Sequence[RecordedShard], fresh: Sequence[Shard]) -> None:
    """Two shards must differ in the bits of their ids that patch ids keep."""
    seen = {shard_number(r.shard.id): r.shard.id for r in recorded}
    for shard in fresh:
        other = seen.setdefault(shard_number(shard.id), shard.id)
        if other != shard.id:
            raise BadInputError(
                f"shards {other} and {shard.id} share their first {SHARD_BITS} bits, so patch ids"
                " could not tell them apart; choose another --shard-size for this source"
            )


def plan_attempts(source: Source, state: LedgerState, attempts: Sequence[Attempt]) -> Plan:
    """Those of these later attempts whose shards the source can reach, as it finds them now."""
    again = {attempt.shard.id: attempt for attempt in attempts}
    offered = [
        replace(r, inputs=None) if r.shard.id in again else r
        for r in state.recorded
        if r.shard.source == source.name
    ]
    found = {shard.id: shard for shard in source.listing(offered).shards} if again else {}
    todo = [replace(a, shard=found[id]) for id, a in again.items() if id in found]
    lost = len(again) - len(todo)
    notes = (f"{lost} shards with such rejects are not in this --input",) if lost else ()
    return Plan((), tuple(todo), len(state.done - again.keys()), notes)


def require_reasons(reasons: Sequence[str]) -> None:
    """Raise BadInputError for a reason that no reject can have."""
    for reason in reasons:
        if reason not in REASONS:
            raise BadInputError(
                f"--retry-rejects '{reason}' is no reason of a reject; choose from"
                f" {', '.join(sorted(REASONS))}"
            )


def next_attempts(
    layout: Layout, state: LedgerState, source: str, reasons: Sequence[str]
) -> tuple[Attempt, ...]:
    """The next attempt of each shard of `source` that has open rejects with these reasons."""
    rejects = open_rejects(layout.rejects, state, ["reason"])
    rejects = rejects.filter(pc.is_in(rejects["reason"], pc.cast(list(reasons), "string")))
    rows: dict[str, list[int]] = defaultdict(list)
    for shard, row in zip(rejects["shard"].to_pylist(), rejects["row"].to_pylist(), strict=True):
        rows[shard].append(row)
    return tuple(
        Attempt(r.shard, state.attempts[r.shard.id] + 1, tuple(sorted(rows[r.shard.id])))
        for r in state.recorded
        if r.shard.source == source and r.shard.id in rows
    )


def open_rejects(path: str, state: LedgerState, columns: Sequence[str] = ()) -> pa.Table:
    """The rejects that are open: shard, attempt, row and these columns of them.

    A reject is open when its attempt is done and no later done attempt of its shard took its row.
    """
    needed = ("shard", "attempt", "row")
    table = lance.dataset(path).to_table(columns=list(dict.fromkeys((*needed, *columns))))
    done = pa.array(list(state.attempts), pa.string())
    again = pa.array(list(state.taken), pa.string())
    finished = table.filter(pc.is_in(table["shard"], done))
    tried_again = pc.is_in(finished["shard"], again)
    # Nearly all shards have one attempt, and what is left of a killed one has a higher number.
    once = finished.filter(pc.and_(pc.invert(tried_again), pc.equal(finished["attempt"], 1)))
    several = finished.filter(tried_again)
    if not several.num_rows:
        return once
    shards, attempts, rows = (several[name].to_pylist() for name in needed)
    still = [
        attempt == state.taken[shard].get(row, 1)
        for shard, attempt, row in zip(shards, attempts, rows, strict=True)
    ]
    return pa.concat_tables([once, several.filter(pa.array(still))])
