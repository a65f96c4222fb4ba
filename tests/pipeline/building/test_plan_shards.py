"""Which shards are tried again, and where their inputs are looked for."""

from pathlib import Path

from pipeline.building.plan_shards import plan_attempts
from schemas.records import Attempt, RecordedShard, Reject
from stages.sources.reading.source_kind import Source
from stages.tables.ledger import LedgerState
from tests.worlds.source_cases import folder_of, open_at, open_folder, tsv_of


def recorded(*sources: Source) -> LedgerState:
    """A ledger in which all shards of these sources are done."""
    shards = [shard for source in sources for shard in source.listing(()).shards]
    return LedgerState(tuple(RecordedShard(shard, 5) for shard in shards), {}, {})


def attempts(state: LedgerState) -> list[Attempt]:
    """A second attempt at the first row of every shard."""
    return [Attempt(known.shard, 2, (0,)) for known in state.recorded]


def test_rejects_are_tried_again_where_their_list_is_now(tmp_path: Path) -> None:
    """A list that grew, moved or was cut into other shards still has the lines of the old ones."""
    path = tsv_of(tmp_path / "l.tsv", 10)
    state = recorded(open_at("cc12m", path, shard_size=5))
    lines = path.read_bytes()
    path.unlink()
    (tmp_path / "grown.tsv").write_bytes(lines + b"http://new/1.jpg\tnew\n")
    source = open_at("cc12m", tmp_path / "grown.tsv", shard_size=4)
    again = plan_attempts(source, state, attempts(state))
    assert [a.shard.id for a in again.todo] == [known.shard.id for known in state.recorded]
    assert [(a.number, a.rows) for a in again.todo] == [(2, (0,)), (2, (0,))]
    urls = [next(iter(source.read(a.shard))).url for a in again.todo]
    assert urls == [f"https://host{n}.example/{n}.jpg" for n in (0, 5)]
    assert not again.fresh
    assert not again.notes


def test_what_is_elsewhere_is_left_as_it_is(tmp_path: Path) -> None:
    """Its rejects keep their reasons, and a note says how many shards were not to be had."""
    here, there = folder_of(tmp_path / "a", 5), folder_of(tmp_path / "b", 9)
    for path in there.rglob("*.jpg"):
        path.rename(path.with_name(f"other-{path.name}"))
    source = open_folder(here, shard_size=5)
    state = recorded(source, open_folder(there, shard_size=3))
    again = plan_attempts(source, state, attempts(state))
    assert [a.shard for a in again.todo] == [state.recorded[0].shard]
    assert not any(isinstance(item, Reject) for item in source.read(again.todo[0].shard))
    assert again.notes == ("3 shards with such rejects are not in this --input",)
    assert again.skipped == 0
