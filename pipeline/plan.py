"""What is to be done: the source's shards minus those the ledger has. Pure; nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from schemas.errors import BadInputError
from schemas.records import Attempt, RecordedShard, Shard
from schemas.tables import SHARD_BITS, shard_number
from stages.ledger import LedgerState
from stages.sources import Source


@dataclass(frozen=True)
class Plan:
    """fresh: shards to record in the ledger first; todo: what is to run, a shard each, in order."""

    fresh: tuple[Shard, ...]
    todo: tuple[Attempt, ...]
    skipped: int
    notes: tuple[str, ...]


def plan(source: Source, state: LedgerState) -> Plan:
    """The shards of `source` that are not done. Raises BadInputError when two ids collide."""
    recorded = [r for r in state.recorded if r.shard.source == source.name]
    listing = source.listing(recorded)
    planned = {r.shard.id for r in state.recorded}
    fresh = tuple(shard for shard in listing.shards if shard.id not in planned)
    todo = tuple(Attempt(shard) for shard in listing.shards if shard.id not in state.done)
    _require_distinct(state.recorded, fresh)
    done = sum(1 for r in recorded if r.inputs is not None)
    return Plan(fresh, todo, done, tuple(listing.notes))


def plan_again(source: Source, state: LedgerState, attempts: Sequence[Attempt]) -> Plan:
    """Those of these later attempts whose shards the source can reach, and where it finds them now."""
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
