"""`arrag-db index` that SIGKILL ends at any of its steps, and is given again, makes the same bytes."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arrag_runtime.format.manifest import IndexManifest, Layout
from pipeline.verify import verify
from tests.worlds.index_world import STEPS_OF, index_files
from tests.worlds.removal_world import add_shard, make_database

pytestmark = pytest.mark.slow

NEVER = 10**9
MORE = ([1, 2, 3, 30, 31, 32], [3, 3, 4, 33, 34, 35])


def index(layout: Layout, moment: int = NEVER) -> int:
    """Run the command in a process of its own; how it ended."""
    words = ["index", "--db", layout.root, "--kind", "codebook", "--lists", "6", "--quiet"]
    words += ["--worker-memory", STEPS_OF, "--max-copies", "1"]
    command = [sys.executable, "-m", "tests.worlds.index_world", str(moment), *words]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture(scope="module", params=["first", "merging"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """One without an index, or one whose index must grow and merge its parts."""
    layout = make_database(tmp_path_factory.mktemp("killed") / "db")
    for number, contents in enumerate(MORE, start=3):
        if request.param == "merging":
            assert index(layout) == 0
        add_shard(layout, number, contents)
    return layout


@pytest.fixture(scope="module")
def undisturbed(database: Layout, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    copy = Layout(shutil.copytree(database.root, tmp_path_factory.mktemp("undisturbed") / "db"))
    assert index(copy) == 0
    return copy


@pytest.mark.parametrize("moment", [3, 9, 16, 24, 32])
def test_a_killed_index_goes_on_to_the_same_bytes(
    moment: int, database: Layout, undisturbed: Layout, tmp_path: Path
) -> None:
    """Killed once more on its way, at a later step of the second run, before it may end."""
    layout = Layout(shutil.copytree(database.root, tmp_path / "db"))
    assert index(layout, moment) == -signal.SIGKILL
    assert list(Path(layout.indexes).glob(".building-*"))
    assert index(layout, 2) == -signal.SIGKILL
    assert index(layout) == 0
    assert index_files(layout, "codebook") == index_files(undisturbed, "codebook")
    made, expected = (IndexManifest.read(one.index("codebook")) for one in (layout, undisturbed))
    assert (made.parts, made.count, made.nprobe) == (
        expected.parts,
        expected.count,
        expected.nprobe,
    )
    assert [path.name for path in Path(layout.indexes).iterdir()] == ["codebook"]
    assert all(check.ok for check in verify(layout.root))
