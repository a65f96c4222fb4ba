"""What the ledger says: which shards are recorded and done, and where their rows end in each table.

A shard's first row says what it consists of, a later one that an attempt at it is done. Rows about
the whole database say what was removed and whether a compaction is under way (`schemas.tables`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import lance

from arrag_runtime.format.location import exists, join
from arrag_runtime.format.manifest import Layout
from schemas.records import RecordedShard, Shard

LEDGER_ROWS = 1024
"""Rows of a ledger that are Python objects at a time: as such they take many times their bytes."""
_COUNTS = ("inputs", "images", "heldout", "patches", "rejects")


@dataclass(frozen=True)
class LedgerState:
    """What all rows of the ledger say together."""

    recorded: tuple[RecordedShard, ...]
    """The shards that were planned or are done, in the order in which they were planned."""
    marks: Mapping[str, int]
    """The highest fragment of each table that belongs to something done."""
    totals: Mapping[str, int]
    """Inputs, images, heldout, patches and open rejects there are, and images removed."""
    attempts: Mapping[str, int] = field(default_factory=dict)
    """The last attempt that is done, by shard."""
    taken: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """The last done attempt that took a row, by shard and row; only of shards tried again."""
    unfinished: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The rows of attempts that were planned and are not done, by shard."""
    compacting: bool = False
    """Whether a compaction was begun and has not ended."""
    by_source: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What `totals` counts, without what was removed, by source."""

    @property
    def done(self) -> frozenset[str]:
        """The ids of the shards that are complete."""
        return frozenset(r.shard.id for r in self.recorded if r.inputs is not None)


def read_ledger(layout: Layout) -> LedgerState:
    """The ledger as it stands; nothing where there is none yet."""
    there = exists(join(layout.ledger, "_versions"))
    return ledger_state(_in_order(layout.ledger) if there else ())


def ledger_state(rows: Iterable[Mapping[str, Any]]) -> LedgerState:
    """What these rows say, by attempt and each planned before it is done; taken one at a time."""
    reading = _Reading()
    for row in rows:
        reading.apply(row)
    return reading.state()


def _in_order(path: str) -> Iterator[dict[str, Any]]:
    """The ledger's rows by attempt, each planned before it is done; few are Python's at a time."""
    columns = ["shard", "source", "attempt", "state", "members", "fragments", *_COUNTS]
    order = [("attempt", "ascending"), ("state", "descending")]
    rows = lance.dataset(path).to_table(columns=columns).sort_by(order)
    for batch in rows.to_batches(max_chunksize=LEDGER_ROWS):
        yield from batch.to_pylist()


class _Reading:
    """A ledger as far as it was read."""

    def __init__(self) -> None:
        self._shards: dict[str, RecordedShard] = {}
        self._marks: dict[str, int] = {}
        self._removed = 0
        self._by_source: dict[str, dict[str, int]] = {}
        self._attempts: dict[str, int] = {}
        self._taken: dict[str, dict[int, int]] = defaultdict(dict)
        self._planned: dict[tuple[str, int], frozenset[int]] = defaultdict(frozenset)
        self._open_compactions = 0

    def apply(self, row: Mapping[str, Any]) -> None:
        """Take in the next row."""
        match row["state"]:
            case "planned" if row["attempt"] == 0:  # What was planned first stays.
                shard = Shard(row["source"], row["shard"], tuple(row["members"]))
                self._shards.setdefault(shard.id, RecordedShard(shard))
            case "planned":  # An attempt that was killed may be planned again, with other rows.
                self._planned[row["shard"], row["attempt"]] |= _rows_taken(row)
            case "done":
                self._finish(row)
            case "removed":
                self._removed -= row["images"]
            case "compacting":
                self._open_compactions += 1
            case "compacted":
                self._open_compactions -= 1
        for name, mark in row["fragments"] or ():
            self._marks[name] = max(self._marks.get(name, -1), mark)
        of_source = self._by_source.setdefault(row["source"], dict.fromkeys(_COUNTS, 0))
        for name in _COUNTS:
            of_source[name] += row[name] or 0

    def _finish(self, row: Mapping[str, Any]) -> None:
        """An attempt that is done; a later one brings no inputs, and takes rows of its own."""
        known = self._shards[row["shard"]]
        inputs = (known.inputs or 0) + row["inputs"]
        self._shards[row["shard"]] = RecordedShard(known.shard, inputs)
        self._attempts[row["shard"]] = row["attempt"]
        self._planned.pop((row["shard"], row["attempt"]), None)
        if row["attempt"] > 1:
            self._taken[row["shard"]].update(dict.fromkeys(_rows_taken(row), row["attempt"]))

    def state(self) -> LedgerState:
        """What the rows so far say."""
        unfinished: dict[str, frozenset[int]] = defaultdict(frozenset)
        for (shard, _), rows in self._planned.items():
            unfinished[shard] |= rows
        counts = self._by_source.values()
        totals = {name: sum(of_source[name] for of_source in counts) for name in _COUNTS}
        return LedgerState(
            recorded=tuple(self._shards.values()),
            marks=self._marks,
            totals=totals | {"removed": self._removed},
            attempts=self._attempts,
            taken=dict(self._taken),
            unfinished=dict(unfinished),
            compacting=self._open_compactions > 0,
            # Rows about the whole database are of no source.
            by_source={name: counts for name, counts in self._by_source.items() if name},
        )


def _rows_taken(ledger_row: Mapping[str, Any]) -> frozenset[int]:
    """The rows that a later attempt takes."""
    return frozenset(map(int, ledger_row["members"] or ()))
