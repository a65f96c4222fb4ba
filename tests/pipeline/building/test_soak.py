"""What happens to long jobs: kills at moments drawn from a seed, full disks, unanswered commits.

After each of them the same command goes on, `verify` finds nothing wrong, and the tables equal those
of a build that nobody disturbed, row for row. One moment of each kind is `slow`, twenty are `soak`.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from arrag_runtime.format.manifest import Layout
from pipeline.build import build
from pipeline.building import run_shards as ray_run
from pipeline.building.shard_worker import EncodeWorker
from pipeline.verify import verify
from tests.pipeline.conftest import settings, write_picture
from tests.worlds.database_rows import all_rows, assert_same_rows
from tests.worlds.processes import encoders

MOMENTS = 20
PATIENCE = 300.0


@dataclass(frozen=True)
class Calm:
    """A build that nobody disturbed, and the seconds from its first table to its end."""

    database: Path
    tars: Path
    weights: Path
    seconds: float

    def command(self, database: Path) -> list[str]:
        """The command line of the same build elsewhere."""
        options = ["--source", "webdataset", "--input", str(self.tars), "--shard-size", "4"]
        options += ["--tokenizer", "vq16", "--tokenizer-weights", str(self.weights)]
        options += ["--hold-out", "0.2", "--workers", "2", "--no-index", "--quiet"]
        return [sys.executable, "-m", "cli", "build", "--db", str(database), *options]


def write_tars(folder: Path) -> None:
    """Two tars of twelve pictures; the second breaks off in the middle of a picture."""
    folder.mkdir()
    for name in ("a", "b"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in range(12):
                picture = folder / f"{name}{number:02}.jpg"
                write_picture(picture, ord(name) * 100 + number)
                tar.add(picture, picture.name)
                picture.unlink()
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(whole[: len(whole) * 5 // 8])


def wait_for_tables(database: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while not (database / "manifest.json").exists():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail("the build made no database")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def calm(narrow_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The build that all others are compared with."""
    folder = tmp_path_factory.mktemp("calm")
    write_tars(folder / "tars")
    made = Calm(folder / "db", folder / "tars", narrow_weights, 0.0)
    with subprocess.Popen(made.command(made.database)) as process:
        wait_for_tables(made.database, process)
        started = time.monotonic()
        assert process.wait() == 0
    rows = all_rows(made.database)
    assert rows["rejects"]["reason"].to_pylist() == ["broken-archive"]
    assert rows["ledger"].num_rows > 8
    return Calm(made.database, made.tars, made.weights, time.monotonic() - started)


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    process.kill()


def kill_worker(process: subprocess.Popen[bytes]) -> None:
    """The first encoder to be seen; the build itself goes on."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        for pid in encoders(process.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


KILLS = {"driver": kill_driver, "worker": kill_worker, "group": kill_group}
CASES = [
    pytest.param(kill, seed, id=f"{name}-{seed}", marks=[pytest.mark.soak, *marks])
    for name, kill in KILLS.items()
    for seed in range(MOMENTS)
    for marks in [[pytest.mark.slow] if seed == 0 else []]
]


@pytest.mark.parametrize(("kill", "seed"), CASES)
def test_a_kill_at_any_moment_costs_no_row(
    kill: Callable[[subprocess.Popen[bytes]], None], seed: int, calm: Calm, tmp_path: Path
) -> None:
    """The moment is drawn over the whole time in which tables are written."""
    database = tmp_path / "db"
    after = random.Random(f"{kill.__name__} {seed}").uniform(0, calm.seconds)
    with subprocess.Popen(calm.command(database), start_new_session=True) as process:
        wait_for_tables(database, process)
        time.sleep(after)
        kill(process)
        ended = process.wait()
    if ended != 0:
        assert kill is not kill_worker, "a worker's death ended the build"
        subprocess.run(calm.command(database), check=True)
    assert_sound(database)
    assert_same_rows(calm.database, database)


def assert_sound(database: Path) -> None:
    assert [check for check in verify(database, full=True) if not check.ok] == []


class FullDisk(EncodeWorker):
    """A worker whose disk takes no file of more than a few bytes."""

    def __call__(self, table: pa.Table) -> pa.Table:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, limits[1]))
        try:
            return super().__call__(table)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


LARGEST_FILE = 2048


@pytest.mark.slow
@pytest.mark.soak
def test_a_full_disk_fails_shards_and_leaves_no_row(
    ray_session: None,
    built: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = settings(tmp_path / "db", pictures, hold_out=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(ray_run, "EncodeWorker", FullDisk)
        patch.setattr("pipeline.build.ATTEMPTS", 1)
        report = build(wanted)
    assert report.shards_done == 0
    assert len(report.failed) == 4
    assert all("File too large" in error for error in report.failed.values())
    assert_sound(tmp_path / "db")
    again = build(wanted)
    assert (again.shards_done, again.failed) == (4, {})
    assert_sound(tmp_path / "db")
    assert_same_rows(built, tmp_path / "db")


TABLES: dict[str, Callable[[Layout], str]] = {
    "patches": lambda layout: f"{layout.root}/patches/",
    "rejects": lambda layout: layout.rejects,
    "images": lambda layout: layout.images,
    "ledger": lambda layout: layout.ledger,
}


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("commit", [1, 2])
def test_a_commit_that_landed_and_was_not_answered_is_not_done_twice(
    table: str,
    commit: int,
    ray_session: None,
    built: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a driver dies, or loses the store, between a commit and knowing of it."""
    layout = Layout(tmp_path / "db")
    own = lance.LanceDataset.commit
    seen = 0

    def lose_the_answer(base: Any, *args: Any, **options: Any) -> Any:
        nonlocal seen
        grown = own(base, *args, **options)
        seen += base.uri.startswith(TABLES[table](layout))
        if seen == commit:
            raise OSError("connection reset by peer")
        return grown

    wanted = settings(tmp_path / "db", pictures, hold_out=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(lance.LanceDataset, "commit", staticmethod(lose_the_answer))
        with pytest.raises(OSError, match="connection reset"):
            build(wanted)
    assert seen == commit
    again = build(wanted)
    assert again.failed == {}
    assert_sound(tmp_path / "db")
    assert_same_rows(built, tmp_path / "db")
