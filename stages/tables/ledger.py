"""What the ledger says: which shards are recorded and done, and where their rows end in each table.

A shard's first row says what it consists of, a later one that an attempt at it is done. Rows about the
whole database say what was removed and whether a compaction is under way.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lance

from arrag_runtime.format.location import exists, join
from arrag_runtime.format.manifest import Layout
from schemas.records import RecordedShard, Shard

COUNTS = ("inputs", "images", "heldout", "patches", "rejects")
LEDGER_ROWS = 1024
"""Rows of a ledger that are Python objects at a time: as such they take many times their bytes."""


@dataclass(frozen=True)
class LedgerState:
    """What the ledger says: shards recorded (planned or done), and each table's mark.

    attempts: a shard's last done attempt; taken: for shards that were tried again, the last done
    attempt that took a row; unfinished: rows of attempts that were planned and are not done.
    totals: `COUNTS` and "removed". compacting: a compaction was begun and has not ended.
    """

    recorded: tuple[RecordedShard, ...]
    marks: Mapping[str, int]
    totals: Mapping[str, int]
    attempts: Mapping[str, int] = field(default_factory=dict)
    taken: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    unfinished: Mapping[str, frozenset[int]] = field(default_factory=dict)
    compacting: bool = False
    by_source: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def done(self) -> frozenset[str]:
        """The ids of the shards that are complete."""
        return frozenset(r.shard.id for r in self.recorded if r.inputs is not None)


def read_ledger(layout: Layout) -> LedgerState:
    """The ledger as it stands; nothing where there is none yet."""
    if not exists(join(layout.ledger, "_versions")):
        return LedgerState((), {}, dict.fromkeys((*COUNTS, "removed"), 0))
    shards: dict[str, RecordedShard] = {}
    marks: dict[str, int] = {}
    totals = dict.fromkeys((*COUNTS, "removed"), 0)
    open_compactions = 0
    by_source: dict[str, dict[str, int]] = {}
    attempts: dict[str, int] = {}
    planned: dict[tuple[str, int], frozenset[int]] = {}
    taken: dict[str, dict[int, int]] = defaultdict(dict)
    for row in _in_order(layout.ledger):
        attempt = row["shard"], row["attempt"]
        if row["state"] == "planned" and row["attempt"] == 0:
            shard = Shard(row["source"], row["shard"], tuple(row["members"]))
            shards.setdefault(shard.id, RecordedShard(shard))
        elif row["state"] == "planned":
            planned[attempt] = planned.get(attempt, frozenset()) | _rows(row)
        elif row["state"] == "done":
            known = shards[row["shard"]]
            inputs = (known.inputs or 0) + row["inputs"]
            shards[row["shard"]] = RecordedShard(known.shard, inputs)
            attempts[row["shard"]] = row["attempt"]
            planned.pop(attempt, None)
            if row["attempt"] > 1:
                taken[row["shard"]].update(dict.fromkeys(_rows(row), row["attempt"]))
        elif row["state"] == "removed":
            totals["removed"] -= row["images"]
        open_compactions += (row["state"] == "compacting") - (row["state"] == "compacted")
        for name, mark in row["fragments"] or ():
            marks[name] = max(marks.get(name, -1), mark)
        of_source = by_source.setdefault(row["source"], dict.fromkeys(COUNTS, 0))
        for name in COUNTS:
            totals[name] += row[name] or 0
            of_source[name] += row[name] or 0
    by_source.pop("", None)  # Rows about the whole database.
    unfinished: dict[str, frozenset[int]] = {}
    for (shard_id, _), open_rows in planned.items():
        unfinished[shard_id] = unfinished.get(shard_id, frozenset()) | open_rows
    recorded = tuple(shards.values())
    return LedgerState(
        *(recorded, marks, totals, attempts, dict(taken), unfinished),
        compacting=open_compactions > 0,
        by_source=by_source,
    )


def _in_order(path: str) -> Iterator[dict[str, Any]]:
    """The ledger's rows by attempt, each planned before it is done; few are Python's at a time."""
    columns = ["shard", "source", "attempt", "state", "members", "fragments", *COUNTS]
    order = [("attempt", "ascending"), ("state", "descending")]
    rows = lance.dataset(path).to_table(columns=columns).sort_by(order)
    for batch in rows.to_batches(max_chunksize=LEDGER_ROWS):
        yield from batch.to_pylist()


def _rows(ledger_row: Mapping[str, Any]) -> frozenset[int]:
    """The rows that a later attempt takes."""
    return frozenset(map(int, ledger_row["members"] or ()))
