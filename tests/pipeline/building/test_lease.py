"""One writer at a time, also across hosts and in buckets, and successors of those that crashed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from arrag_runtime.format.errors import BadInputError, DatabaseBusyError, LeaseLostError
from arrag_runtime.format.location import exists, join, make_folder, names_in, write_bytes
from arrag_runtime.format.manifest import Layout
from pipeline.resources.lease import BEAT, Beat, Holder, _create, _numbers, _read, _to_bytes, lease
from schemas.records import Shard
from schemas.tables import REJECTS_SCHEMA
from stages.tables.committer import REJECTS, Committer, ShardResult, create_tables, write_fragments
from stages.tables.ledger import read_ledger
from tests.worlds.patch_world import KEYS, SPEC

QUICK = Beat(seconds=0.1, missed=4)
ELSEWHERE = Holder("other", "arrag-db build", "node-7", 41, "node-7 boot pid", "9", 0.0, 0.0)


def left_by_another_host(layout: Layout, *, seconds_ago: float) -> Holder:
    """A record that a holder on another host renewed some time ago by its clock."""
    record = replace(ELSEWHERE, since=time.time() - 99, renewed=time.time() - seconds_ago)
    make_folder(layout.leases)
    assert _create(layout, 1, record)
    return record


def refused(layout: Layout, beat: Beat = BEAT) -> str:
    """What a second writer is told."""
    with pytest.raises(DatabaseBusyError) as caught, lease(layout, "arrag-db build", beat):
        pytest.fail("two writers")
    return str(caught.value)


def records(layout: Layout) -> dict[int, bool]:
    """The numbers of the records, and whether each is released."""
    return {number: _read(layout, number).released for number in _numbers(layout)}


def test_the_second_writer_is_refused_and_told_who_holds(place: str) -> None:
    layout = Layout(place)
    with lease(layout, "arrag-db index"):
        told = refused(layout)
    assert f"`arrag-db index`, process {os.getpid()} on " in told
    assert "since 20" in told
    assert "wait for it, or end it" in told
    assert "\n" not in told


def test_a_lease_that_is_released_goes_to_the_next(place: str) -> None:
    layout = Layout(place)
    write_here(layout)
    for number in (1, 2, 3):
        with lease(layout, "arrag-db build") as held:
            held.check()
            assert records(layout)[number] is False
        assert records(layout) == {number: True}


def test_nothing_is_left_where_nothing_came_of_it(place: str) -> None:
    with lease(Layout(place), "arrag-db build"):
        pass
    assert names_in(place) == []
    if "://" not in place:
        assert not exists(place)


def write_here(layout: Layout) -> None:
    """Something that keeps the database's folder from being taken away as empty."""
    make_folder(layout.root)
    write_bytes(join(layout.root, "kept"), b"")


HOLD = (
    "import sys, time; from pipeline.resources.lease import lease; from arrag_runtime.format.manifest import Layout\n"
    "with lease(Layout(sys.argv[1]), 'arrag-db build'): print('held', flush=True); time.sleep(99)"
)


def test_who_follows_a_killed_writer_on_this_host_need_not_wait(place: str) -> None:
    run = [sys.executable, "-c", HOLD, place]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"process {holder.pid} on " in refused(Layout(place))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        started = time.monotonic()
        with lease(Layout(place), "arrag-db build"):
            assert time.monotonic() - started < 5
            assert max(records(Layout(place))) == 2


def test_a_fresh_record_of_another_host_is_believed(place: str) -> None:
    left_by_another_host(Layout(place), seconds_ago=5)
    assert "process 41 on node-7" in refused(Layout(place))


def test_a_record_without_a_sign_of_life_is_taken_over_after_a_while(place: str) -> None:
    layout = Layout(place)
    left_by_another_host(layout, seconds_ago=60)
    write_here(layout)
    started = time.monotonic()
    with lease(layout, "arrag-db build", QUICK):
        assert time.monotonic() - started >= QUICK.patience
        assert records(layout) == {1: False, 2: False}
    assert records(layout) == {2: True}


@contextmanager
def beating(layout: Layout, record: Holder) -> Iterator[None]:
    """A holder that is alive, whatever its clock says."""
    over = threading.Event()

    def beat() -> None:
        for beats in range(1, 10_000):
            if over.wait(QUICK.seconds):
                return
            text = _to_bytes(replace(record, beats=beats))
            write_bytes(join(layout.leases, "0000000001.json"), text)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("seconds_ago", [3600, -3600])
def test_a_holder_whose_clock_is_wrong_keeps_its_lease(place: str, seconds_ago: float) -> None:
    layout = Layout(place)
    record = left_by_another_host(layout, seconds_ago=seconds_ago)
    with beating(layout, record):
        assert "node-7" in refused(layout, QUICK)


def test_one_of_many_that_come_at_once_gets_it(place: str) -> None:
    layout = Layout(place)
    left_by_another_host(layout, seconds_ago=60)
    start, done = threading.Barrier(6), threading.Event()
    won: list[int] = []
    refused: list[str] = []

    def try_once(number: int) -> None:
        start.wait()
        try:
            with lease(layout, "arrag-db build", QUICK):
                won.append(number)
                done.wait(30)
        except DatabaseBusyError as error:
            refused.append(str(error))
            if len(refused) == 5:
                done.set()

    threads = [threading.Thread(target=try_once, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)


def test_a_holder_that_was_taken_over_finds_out_before_it_commits(place: str) -> None:
    """As after a long sleep of its host: its thread gave no sign of life, another came."""
    layout = Layout(place)
    create_tables(layout, SPEC, KEYS)
    with lease(layout, "arrag-db build", QUICK) as held:
        committer = Committer(layout, KEYS, held.check)
        committer.plan([Shard("toy", f"{1 << 40:016x}", ("m",))])
        held.check()
        assert _create(layout, 2, replace(ELSEWHERE, renewed=time.time()))
        time.sleep(QUICK.patience)
        committer_alone = Committer(layout, KEYS)
        rejects = REJECTS_SCHEMA.empty_table()
        late = "taken over by .*node-7"
        with pytest.raises(LeaseLostError, match=late):
            committer.commit(result(layout, rejects))
        with pytest.raises(LeaseLostError, match=late):
            committer.plan([Shard("toy", f"{2 << 40:016x}", ("m",))])
        assert len(read_ledger(layout).recorded) == 1
        assert not read_ledger(layout).done
    assert records(layout)[2] is False, "the successor's record stays as it is"
    committer_alone.commit(result(layout, rejects))
    assert len(read_ledger(layout).done) == 1


def result(layout: Layout, rejects: object) -> ShardResult:
    fragments = {REJECTS: write_fragments(layout.rejects, rejects)}
    return ShardResult(f"{1 << 40:016x}", "toy", 1, 0, 0, 0, 0, {}, fragments)


def test_what_is_committed_beside_this_writer_stops_it(tmp_path: Path) -> None:
    """Lance would rebase on it, and rows could be there twice; no ledger row says they are done."""
    layout = Layout(tmp_path)
    create_tables(layout, SPEC, KEYS)
    committer = Committer(layout, KEYS)
    committer.plan([Shard("toy", f"{1 << 40:016x}", ("m",))])
    row = {"shard": f"{1 << 40:016x}", "attempt": 1, "row": 0, "key": "k", "stage": "read"}
    row |= {"reason": "missing", "detail": "", "url": None}
    rejects = pa.Table.from_pylist([row], schema=REJECTS_SCHEMA)
    lance.write_dataset(rejects, layout.rejects, mode="append")
    doubled = replace(result(layout, rejects), inputs=1, rejects={"missing": 1})
    with pytest.raises(LeaseLostError, match="something else was committed"):
        committer.commit(doubled)
    assert not read_ledger(layout).done
    again = Committer(layout, KEYS)
    assert again.recover(read_ledger(layout)) == 2
    assert lance.dataset(layout.rejects).count_rows() == 0


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    layout = Layout(f"{bucket}-not/db")
    with (
        pytest.raises(BadInputError, match="check the bucket's name") as caught,
        lease(layout, "arrag-db build"),
    ):
        pytest.fail("no such bucket")
    assert "\n" not in str(caught.value)
