"""The Lance writer of builds: fragments in workers, one commit in the driver.

A shard is committed in a fixed order (patches, rejects, images, then its row in the ledger), and
the ledger's row alone says that the shard is done. Whatever a killed build left behind is either a
file that no table knows, or fragments newer than the last ledger row; `recover` drops the latter.
Rejects that are tried again are a later attempt of their shard (see `schemas.tables`).
A compaction says so in the ledger before it starts, since its fragments are newer and complete.
"""

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import write_fragments as lance_write_fragments

from arrag_runtime.format.errors import IncompatibleError, LeaseLostError
from arrag_runtime.format.ids import POSITION_BITS, ROW_BITS, shard_number
from arrag_runtime.format.location import exists, join, make_folder
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.specs import KeySpec, TokenizerSpec
from schemas.records import Attempt, Shard
from schemas.tables import LEDGER_SCHEMA, REJECTS_SCHEMA, images_schema, patches_schema
from stages.tables.ledger import LEDGER_ROWS, LedgerState

PATCHES, REJECTS, IMAGES = "patches", "rejects", "images"
"""The tables that a shard's rows go to, as the ledger names them."""
_COMMIT_ORDER = (PATCHES, REJECTS, IMAGES)
CLEAN_EVERY = 50
"""Commits to a table between two cleanings of its versions."""
_METADATA_CACHE = 1 << 20
"""Bytes. Lance would keep every version of every table it has opened, up to a gigabyte."""
KEPT_VERSIONS = 50
"""Versions of a table that stay for those who just read them."""


@dataclass(frozen=True)
class ShardResult:
    """What a worker made of a shard: written, uncommitted fragments and counts."""

    shard: str
    """The shard's id."""
    source: str
    """The name of its source."""
    attempt: int
    """1 for the first attempt at it."""
    inputs: int
    """How many inputs it has; 0 for a later attempt, which brings none."""
    images: int
    """Pictures that became rows, held-out ones included."""
    heldout: int
    """Pictures that were held out."""
    patches: int
    """Rows for the patches table."""
    rejects: Mapping[str, int]
    """How many inputs were rejected, by reason."""
    fragments: Mapping[str, Sequence[str]]
    """The fragments that were written, as JSON, by the table's name."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each stage took."""
    agreement: float | None = None
    """The share of tokens that are those of float32, where it was measured."""
    retried: Sequence[int] = ()
    """The rows that a later attempt took."""

    @property
    def open_rejects(self) -> int:
        """By how many this changes the number of open rejects."""
        return sum(self.rejects.values()) - len(self.retried)

    def to_json(self) -> str:
        """As it travels from the worker to the driver."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "ShardResult":
        """What `to_json` wrote."""
        return ShardResult(**json.loads(text))


@dataclass(frozen=True)
class Deletion:
    """What a compaction deletes of a shard."""

    shard: str
    """The shard's id."""
    source: str
    """The name of its source."""
    images: tuple[int, ...]
    """The pictures, by id."""
    heldout: int
    """How many of them were held out."""
    patches: int
    """How many patches they had."""


def table_paths(layout: Layout, keys: KeySpec) -> dict[str, str]:
    """Where the tables are that a shard's rows go to, by name."""
    return {PATCHES: layout.patches(keys), REJECTS: layout.rejects, IMAGES: layout.images}


def write_fragments(path: str, table: pa.Table) -> list[str]:
    """Write rows as fragments that no version of the table knows yet; none for no rows."""
    if table.num_rows == 0:
        return []
    return [
        json.dumps(f.to_json()) for f in lance_write_fragments(table, path, schema=table.schema)
    ]


def create_tables(layout: Layout, spec: TokenizerSpec, keys: KeySpec) -> None:
    """Create the empty tables of a new database, over those of a creation that was killed."""
    schemas = {
        layout.patches(keys): patches_schema(spec, keys),
        layout.rejects: REJECTS_SCHEMA,
        layout.images: images_schema(spec, latents=keys.space == "latent"),
        layout.ledger: LEDGER_SCHEMA,
    }
    for path, schema in schemas.items():
        make_folder(path.rpartition("/")[0])
        mode = "overwrite" if exists(join(path, "_versions")) else "create"
        lance.write_dataset(schema.empty_table(), path, schema=schema, mode=mode)


def clean_versions(paths: Sequence[str]) -> None:
    """Delete the versions of these tables that nobody reads any more; anyone may, at any time.

    It reads the list of fragments of every version, several at once, so that it takes memory and
    time where there are many.
    """
    for path in paths:
        lance.dataset(path).cleanup_old_versions(retain_versions=KEPT_VERSIONS)


class Committer:
    """The one writer of a database's tables; its holder has the lease.

    check: called before every commit; raises when the lease is lost, and nothing is committed.
    clean: given the tables' paths now and then, to delete old versions; it may do so later.
    """

    def __init__(
        self,
        layout: Layout,
        keys: KeySpec,
        check: Callable[[], None] = lambda: None,
        clean: Callable[[Sequence[str]], None] = clean_versions,
    ) -> None:
        self._check, self._clean = check, clean
        # Every version of a table that is opened stays in a cache; ours are read once.
        self._session = lance.Session(metadata_cache_size_bytes=_METADATA_CACHE)
        self._ledger = lance.dataset(layout.ledger, session=self._session)
        self._paths = table_paths(layout, keys)
        self._open()
        self._commits = 0

    def _open(self) -> None:
        """Take the tables at their newest versions, and their highest fragments."""
        self._tables = {
            name: lance.dataset(path, session=self._session) for name, path in self._paths.items()
        }
        self._highest = {name: _highest_fragment(table) for name, table in self._tables.items()}

    def recover(self, state: LedgerState) -> int:
        """Drop what attempts without a ledger row left in the tables; returns the rows dropped.

        Only fragments newer than the last ledger row are looked at, and of these only such are
        dropped that hold nothing else. After a compaction that was interrupted they are all
        complete, since it started from a recovered database: it is ended where it stands.
        """
        if state.compacting:
            self.end_compaction()
            return 0
        dropped = 0
        for name, table in self._tables.items():
            mark = state.marks.get(name, -1)
            fresh = [f for f in table.get_fragments() if f.fragment_id > mark]
            stale = [f for f in fresh if _is_unfinished(name, f, state)]
            if stale:
                dropped += sum(f.count_rows() for f in stale)
                ids = [f.fragment_id for f in stale]
                operation = lance.LanceOperation.Delete([], ids, "unfinished shards")
                self._tables[name] = self._commit(table, operation)
                self._highest[name] = _highest_fragment(self._tables[name])
        return dropped

    def plan(self, shards: Iterable[Shard]) -> None:
        """Record the members of shards that are to be done, before any of them is."""
        self._append_ledger(
            {"shard": s.id, "source": s.source, "attempt": 0, "state": "planned"}
            | {"members": list(s.members), "time": _now()}
            for s in shards
        )

    def plan_again(self, attempts: Iterable[Attempt]) -> None:
        """Record which rejects are about to be tried again, before any of them is."""
        self._append_ledger(
            {"shard": a.shard.id, "source": a.shard.source, "attempt": a.number}
            | {"state": "planned", "members": list(map(str, a.rows)), "time": _now()}
            for a in attempts
        )

    def commit(self, result: ShardResult) -> None:
        """Make an attempt's rows visible, and last the ledger's row that says so."""
        rejects = result.open_rejects
        if result.inputs != result.images + rejects:
            raise IncompatibleError(
                f"shard {result.shard}: {result.inputs} inputs and {len(result.retried)} rows again,"
                f" but {result.images} images and {sum(result.rejects.values())} rejects; nothing of"
                " it was committed"
            )
        for name in _COMMIT_ORDER:
            if fragments := result.fragments.get(name):
                self._append(name, fragments)
        self._append_ledger(
            [
                {"shard": result.shard, "source": result.source, "attempt": result.attempt}
                | {"state": "done", "inputs": result.inputs, "images": result.images}
                | {"heldout": result.heldout, "patches": result.patches, "rejects": rejects}
                | {"members": [str(row) for row in result.retried] or None}
                | self._marks()
            ]
        )
        self._commits += 1
        if self._commits % CLEAN_EVERY == 0:
            # One file per row is slow to read when resuming.
            self._check()
            self._ledger.optimize.compact_files()
            self._ledger.checkout_latest()
            self._clean([table.uri for table in (*self._tables.values(), self._ledger)])

    def begin_compaction(self, deletions: Iterable[Deletion]) -> None:
        """Record what the tables are about to lose, before they do."""
        begun = {"shard": "", "source": "", "attempt": 0, "state": "compacting", "time": _now()}
        removed = (
            {"shard": lost.shard, "source": lost.source, "attempt": 0, "state": "removed"}
            | {"images": -len(lost.images), "heldout": -lost.heldout, "patches": -lost.patches}
            | {"members": list(map(str, lost.images)), "inputs": 0, "rejects": 0, "time": _now()}
            for lost in deletions
        )
        self._append_ledger(chain((begun,), removed))

    def end_compaction(self) -> None:
        """Record the tables' new versions and marks; what is in them now is complete."""
        self._open()
        row = {"shard": "", "source": "", "attempt": 0, "state": "compacted"}
        self._append_ledger([row | self._marks()])

    def _marks(self) -> dict[str, object]:
        """The versions and marks of a ledger row, and its time."""
        versions = [(name, self._tables[name].version) for name in _COMMIT_ORDER]
        marks = [(name, self._highest[name]) for name in _COMMIT_ORDER]
        return {"versions": versions, "fragments": marks, "time": _now()}

    def _append(self, name: str, fragments: Sequence[str]) -> None:
        table = self._tables[name]
        new = [lance.FragmentMetadata.from_json(text) for text in fragments]
        grown = self._commit(table, lance.LanceOperation.Append(new))
        # Ids go up by one, but for the first after a deletion; to list all takes ever longer.
        mark = self._highest[name] + len(new)
        known = grown.get_fragment(mark) and not grown.get_fragment(mark + 1)
        self._tables[name] = grown
        self._highest[name] = mark if known else _highest_fragment(grown)

    def _append_ledger(self, rows: Iterable[dict[str, object]]) -> None:
        """All of these rows or none; few are Python's at a time. Nothing for no rows."""
        left = iter(rows)
        batches = []
        while few := list(islice(left, LEDGER_ROWS)):
            batches.append(pa.RecordBatch.from_pylist(few, schema=LEDGER_SCHEMA))
        if not batches:
            return
        table = pa.Table.from_batches(batches)
        new = lance_write_fragments(table, self._ledger.uri, schema=LEDGER_SCHEMA)
        self._ledger = self._commit(self._ledger, lance.LanceOperation.Append(new))

    def _commit(self, table: lance.LanceDataset, operation: Any) -> lance.LanceDataset:
        """The table's next version. Raises LeaseLostError when there was another in between.

        Lance rebases an append on whatever it finds, be it another writer's or, where a store
        answered too late, the same append; both would double rows. The ledger has no row for them
        then, so the next build drops them.
        """
        self._check()
        grown = lance.LanceDataset.commit(table, operation, read_version=table.version)
        if grown.version != table.version + 1:
            raise LeaseLostError(
                f"{table.uri} is at version {grown.version} after one commit to {table.version}, so"
                " something else was committed beside this; run the same command again once no"
                " other process writes to the database"
            )
        return grown


def _highest_fragment(table: lance.LanceDataset) -> int:
    return max((f.fragment_id for f in table.get_fragments()), default=-1)


def _is_unfinished(name: str, fragment: lance.LanceFragment, state: LedgerState) -> bool:
    """Whether all rows of this fragment belong to attempts that the ledger does not call done."""
    if name == REJECTS:
        table = fragment.to_table(columns=["shard", "attempt"])
        held = set(zip(*(table[column].to_pylist() for column in table.column_names), strict=True))
        return all(state.attempts.get(shard, 0) < attempt for shard, attempt in held)
    column, shift = ("patch_id", POSITION_BITS) if name == PATCHES else ("image_id", 0)
    ids = np.unique(fragment.to_table(columns=[column])[column].to_numpy() >> shift)
    open_rows = {shard_number(shard): rows for shard, rows in state.unfinished.items()}
    done = {shard_number(shard) for shard in state.done}
    rows, numbers = ids & ((1 << ROW_BITS) - 1), ids >> ROW_BITS
    return all(
        number not in done or row in open_rows.get(number, ())
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
