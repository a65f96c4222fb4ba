"""A build that SIGKILL ends in each of its windows, and is started again, loses and doubles nothing.

The windows are found by watching the tables' files: the build is stopped at the first sign of one,
looked at, and killed if it really stands inside; otherwise it goes on to its next shard.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lance
import pytest

from arrag_runtime.format.ids import shard_number
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from stages.tables.ledger import read_ledger
from tests.pipeline.conftest import SHARD_SIZE, write_picture
from tests.worlds.database_rows import assert_same_rows

pytestmark = pytest.mark.slow

PATIENCE = 180.0


def command(database: Path, pictures: Path, *options: str) -> list[str]:
    """The command line of a build of the folder."""
    build = ["build", "--source", "folder", "--input", str(pictures), "--db", str(database)]
    build += ["--shard-size", str(SHARD_SIZE), "--hold-out", "0.2", "--no-index", "--quiet"]
    return [sys.executable, "-m", "cli", *build, *options]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures and two that cannot be used: eleven shards."""
    folder = tmp_path_factory.mktemp("many")
    for seed in range(40):
        write_picture(folder / f"{seed:02}.jpg", seed)
    (folder / "00-empty.jpg").write_bytes(b"")
    (folder / "33-page.png").write_text("<html></html>")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a build that nobody disturbed."""
    database = tmp_path_factory.mktemp("uninterrupted") / "db"
    subprocess.run(command(database, many, "--workers", "2"), check=True)
    return database


class Tables:
    """What can be seen of a database's tables from outside the process that writes them."""

    def __init__(self, database: Path) -> None:
        layout = Layout(database)
        keys = DatabaseManifest.read(layout).keys
        self.layout = layout
        self.patches, self.images, self.ledger = (
            Path(layout.patches(keys)),
            Path(layout.images),
            Path(layout.ledger),
        )

    def versions(self, table: Path) -> int:
        """How many versions a table has."""
        return len(list((table / "_versions").glob("*.manifest")))

    def files(self, table: Path) -> int:
        """How many data files a table's folder holds, known to it or not."""
        return len(list((table / "data").glob("*.lance")))

    def unfinished(self) -> tuple[bool, bool]:
        """Whether patches, and whether images, have rows of shards the ledger lacks."""
        done = {shard_number(shard) for shard in read_ledger(self.layout).done}
        ids = lance.dataset(self.patches).to_table(columns=["patch_id"])["patch_id"].to_numpy()
        shards = lance.dataset(self.images).to_table(columns=["shard"])["shard"].to_pylist()
        held = {shard_number(shard) for shard in shards}
        return bool(set((ids >> 24).tolist()) - done), bool(held - done)


def written_not_committed(tables: Tables) -> bool:
    """Fragments lie in the folder of a table that does not know them, and nothing else."""
    known = sum(len(f.data_files()) for f in lance.dataset(tables.patches).get_fragments())
    return tables.files(tables.patches) > known and tables.unfinished() == (False, False)


def patches_but_no_images(tables: Tables) -> bool:
    """Patches of a shard are committed, its images are not."""
    return tables.unfinished() == (True, False)


def all_but_the_ledger(tables: Tables) -> bool:
    """Patches and images of a shard are committed, its ledger row is not."""
    return tables.unfinished() == (True, True)


WINDOWS: dict[str, tuple[Callable[[Tables], bool], Callable[[Tables], int]]] = {
    "fragments written": (written_not_committed, lambda t: t.files(t.patches)),
    "patches committed": (patches_but_no_images, lambda t: t.versions(t.patches)),
    "all but the ledger": (all_but_the_ledger, lambda t: t.versions(t.images)),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_killed_build_goes_on_to_the_same_tables(
    window: str, many: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    inside, sign = WINDOWS[window]
    for attempt in range(6):
        database = tmp_path / f"db{attempt}"
        if _kill_inside(command(database, many, "--workers", "1"), database, inside, sign):
            break
    else:
        pytest.fail(f"no build could be caught in the window: {window}")
    assert inside(Tables(database))
    subprocess.run(command(database, many, "--workers", "2"), check=True)
    assert_same_rows(uninterrupted, database)
    checked = [sys.executable, "-m", "cli", "verify", "--db", str(database), "--full"]
    assert subprocess.run(checked, check=False).returncode == 0


def _kill_inside(
    build: list[str],
    database: Path,
    inside: Callable[[Tables], bool],
    sign: Callable[[Tables], int],
) -> bool:
    """Run a build and kill it inside the window; False when it ended without being caught."""
    process = subprocess.Popen(build)
    try:
        tables = _wait_for_tables(database, process)
        seen = sign(tables)
        for _ in _while_running(process):
            if (now := sign(tables)) == seen:
                continue
            seen = now
            os.kill(process.pid, signal.SIGSTOP)
            if inside(tables):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return True
            os.kill(process.pid, signal.SIGCONT)
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_for_tables(database: Path, process: subprocess.Popen[bytes]) -> Tables:
    for _ in _while_running(process):
        if (database / "manifest.json").exists():
            return Tables(database)
        time.sleep(0.01)
    raise AssertionError("the build ended before it had made a database")


def _while_running(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Once a turn, as long as the process runs and patience lasts."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None:
        if time.monotonic() > end:
            raise AssertionError(f"the build still ran after {PATIENCE} s")
        yield
