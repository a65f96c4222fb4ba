"""The Lance writer of builds: fragments in workers, one commit in the driver.

A shard is committed in a fixed order (patches, rejects, images, then its row in the ledger), and
the ledger's row alone says that the shard is done. Whatever a killed build left behind is either a
file that no table knows, or fragments newer than the last ledger row; `recover` drops the latter.
A compaction says so in the ledger before it starts, since its fragments are newer and complete.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import lance
import pyarrow as pa
from lance.fragment import write_fragments as lance_write_fragments

from schemas.errors import IncompatibleError
from schemas.location import exists, join, make_folder
from schemas.manifest import Layout
from schemas.records import RecordedShard, Shard
from schemas.specs import KeySpec, TokenizerSpec
from schemas.tables import (
    LEDGER_SCHEMA,
    POSITION_BITS,
    REJECTS_SCHEMA,
    ROW_BITS,
    images_schema,
    patches_schema,
    shard_number,
)

PATCHES, REJECTS, IMAGES = "patches", "rejects", "images"
COMMIT_ORDER = (PATCHES, REJECTS, IMAGES)
COUNTS = ("inputs", "images", "heldout", "patches", "rejects")
CLEAN_EVERY = 200
KEEP_VERSIONS = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class ShardResult:
    """What a worker made of a shard: written, uncommitted fragments and counts."""

    shard: str
    source: str
    attempt: int
    inputs: int
    images: int
    heldout: int
    patches: int
    rejects: Mapping[str, int]
    fragments: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None

    def to_json(self) -> str:
        """As it travels from the worker to the driver."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "ShardResult":
        """What `to_json` wrote."""
        return ShardResult(**json.loads(text))


@dataclass(frozen=True)
class Loss:
    """The pictures that a compaction takes out of a shard, by id, and what they count for."""

    shard: str
    source: str
    images: tuple[int, ...]
    heldout: int
    patches: int


@dataclass(frozen=True)
class LedgerState:
    """What the ledger says: shards recorded (planned or done), and each table's mark.

    totals: `COUNTS` and "removed". compacting: a compaction was begun and has not ended.
    """

    recorded: tuple[RecordedShard, ...]
    marks: Mapping[str, int]
    totals: Mapping[str, int]
    compacting: bool = False
    by_source: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def done(self) -> frozenset[str]:
        """The ids of the shards that are complete."""
        return frozenset(r.shard.id for r in self.recorded if r.inputs is not None)


def table_paths(layout: Layout, keys: KeySpec) -> dict[str, str]:
    """The tables a shard's rows go to, by the names the ledger uses."""
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


def read_ledger(layout: Layout) -> LedgerState:
    """The ledger as it stands; nothing where there is none yet."""
    if not exists(join(layout.ledger, "_versions")):
        return LedgerState((), {}, dict.fromkeys((*COUNTS, "removed"), 0))
    rows = lance.dataset(layout.ledger).to_table().to_pylist()
    shards: dict[str, RecordedShard] = {}
    marks: dict[str, int] = {}
    totals = dict.fromkeys((*COUNTS, "removed"), 0)
    open_compactions = 0
    by_source: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["state"] == "planned":
            shard = Shard(row["source"], row["shard"], tuple(row["members"]))
            shards.setdefault(shard.id, RecordedShard(shard))
    for row in rows:
        if row["state"] == "done":
            shards[row["shard"]] = RecordedShard(shards[row["shard"]].shard, row["inputs"])
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
    return LedgerState(
        tuple(shards.values()), marks, totals, open_compactions > 0, by_source=by_source
    )


class Committer:
    """The one writer of a database's tables; its holder has the lease."""

    def __init__(self, layout: Layout, keys: KeySpec) -> None:
        self._paths = table_paths(layout, keys)
        self._ledger = lance.dataset(layout.ledger)
        self._tables = {name: lance.dataset(path) for name, path in self._paths.items()}
        self._commits = 0

    def recover(self, state: LedgerState) -> int:
        """Drop what shards without a ledger row left in the tables; returns the rows dropped.

        Only fragments newer than the last ledger row are looked at. After a compaction that was
        interrupted they are all complete, since it started from a recovered database: it is ended
        where it stands, and nothing is dropped.
        """
        if state.compacting:
            self.end_compaction()
            return 0
        done = {shard_number(shard) for shard in state.done}
        dropped = 0
        for name, table in self._tables.items():
            mark = state.marks.get(name, -1)
            fresh = [f for f in table.get_fragments() if f.fragment_id > mark]
            stale = [f for f in fresh if not _shard_numbers(name, f) & done]
            if stale:
                dropped += sum(f.count_rows() for f in stale)
                ids = [f.fragment_id for f in stale]
                operation = lance.LanceOperation.Delete([], ids, "unfinished shards")
                self._tables[name] = lance.LanceDataset.commit(
                    table, operation, read_version=table.version
                )
        return dropped

    def plan(self, shards: Iterable[Shard]) -> None:
        """Record the members of shards that are to be done, before any of them is."""
        rows = [
            {"shard": s.id, "source": s.source, "attempt": 0, "state": "planned"}
            | {"members": list(s.members), "time": _now()}
            for s in shards
        ]
        if rows:
            self._append_ledger(rows)

    def commit(self, result: ShardResult) -> None:
        """Make a shard's rows visible, and last the ledger's row that says so."""
        rejects = sum(result.rejects.values())
        if result.inputs != result.images + rejects:
            raise IncompatibleError(
                f"shard {result.shard}: {result.inputs} inputs, but {result.images} images and"
                f" {rejects} rejects; nothing of it was committed"
            )
        for name in COMMIT_ORDER:
            if fragments := result.fragments.get(name):
                self._append(name, fragments)
        self._append_ledger(
            [
                {"shard": result.shard, "source": result.source, "attempt": result.attempt}
                | {"state": "done", "inputs": result.inputs, "images": result.images}
                | {"heldout": result.heldout, "patches": result.patches, "rejects": rejects}
                | self._marks()
            ]
        )
        self._commits += 1
        if self._commits % CLEAN_EVERY == 0:
            for table in (*self._tables.values(), self._ledger):
                table.cleanup_old_versions(older_than=KEEP_VERSIONS)

    def begin_compaction(self, losses: Iterable[Loss]) -> None:
        """Record what the tables are about to lose, before they do."""
        counts = {"inputs": 0, "rejects": 0, "time": _now()}
        rows: list[dict[str, object]] = [
            {"shard": "", "source": "", "attempt": 0, "state": "compacting", "time": _now()}
        ]
        rows += [
            {"shard": loss.shard, "source": loss.source, "attempt": 0, "state": "removed"}
            | {"images": -len(loss.images), "heldout": -loss.heldout, "patches": -loss.patches}
            | {"members": [str(image) for image in loss.images]}
            | counts
            for loss in losses
        ]
        self._append_ledger(rows)

    def end_compaction(self) -> None:
        """Record the tables' new versions and marks; what is in them now is complete."""
        self._tables = {name: lance.dataset(path) for name, path in self._paths.items()}
        row = {"shard": "", "source": "", "attempt": 0, "state": "compacted"}
        self._append_ledger([row | self._marks()])

    def _marks(self) -> dict[str, object]:
        """The versions and marks of a ledger row, and its time."""
        tables = {name: self._tables[name] for name in COMMIT_ORDER}
        marks = {
            name: max((f.fragment_id for f in table.get_fragments()), default=-1)
            for name, table in tables.items()
        }
        versions = [(name, table.version) for name, table in tables.items()]
        return {"versions": versions, "fragments": list(marks.items()), "time": _now()}

    def _append(self, name: str, fragments: Sequence[str]) -> None:
        table = self._tables[name]
        new = [lance.FragmentMetadata.from_json(text) for text in fragments]
        self._tables[name] = lance.LanceDataset.commit(
            table, lance.LanceOperation.Append(new), read_version=table.version
        )

    def _append_ledger(self, rows: list[dict[str, object]]) -> None:
        table = pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)
        self._ledger = lance.write_dataset(table, self._ledger, mode="append")


def _shard_numbers(name: str, fragment: lance.LanceFragment) -> set[int]:
    """The shards (as numbers) that rows of this fragment belong to."""
    if name == PATCHES:
        ids = fragment.to_table(columns=["patch_id"])["patch_id"].to_numpy()
        return set((ids >> (ROW_BITS + POSITION_BITS)).tolist())
    column = fragment.to_table(columns=["shard"])["shard"]
    return {shard_number(shard) for shard in column.unique().to_pylist()}


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
