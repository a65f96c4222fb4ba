"""A database in a bucket: built, killed, resumed, indexed, queried and verified on servers of both stores."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arrag_runtime.format.errors import DatabaseBusyError
from arrag_runtime.format.location import exists, names_in
from arrag_runtime.format.manifest import Layout
from pipeline.resources.lease import lease
from stages.tables.ledger import read_ledger
from tests.worlds.database_rows import assert_same_rows

pytestmark = pytest.mark.slow

PATIENCE = 240.0


def command(name: str, database: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "cli", name, "--db", database, *options]


def told(line: list[str]) -> dict[str, object]:
    """What a command prints with --json."""
    run = subprocess.run([*line, "--json"], stdout=subprocess.PIPE, check=True)
    fields: dict[str, object] = json.loads(run.stdout)
    return fields


def test_all_commands_work_on_a_bucket(
    bucket: str, built: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARRAG_CACHE", str(tmp_path / "cache"))
    database = f"{bucket}/made/db"
    options = ["--source", "folder", "--input", str(pictures), "--shard-size", "4", "-q"]
    build = command("build", database, *options, "--hold-out", "0.3", "--workers", "1")
    layout = Layout(database)
    with subprocess.Popen([*build, "--no-index"]) as process:
        end = time.monotonic() + PATIENCE
        while not (exists(layout.manifest) and read_ledger(layout).done):
            assert process.poll() is None, "the build ended by itself"
            assert time.monotonic() < end, "no shard was done in time"
            time.sleep(0.2)
        with pytest.raises(DatabaseBusyError, match=f"process {process.pid} on"):
            lease(layout, "arrag-db index").__enter__()
        process.kill()
    assert len(read_ledger(layout).done) < 4
    resumed = told(build)
    assert resumed["shards_skipped"] != 0
    assert resumed["images"] == 10
    assert_same_rows(built, database)
    assert told(command("verify", database, "--full"))["ok"] is True
    asked = ["--image", str(pictures / "01.jpg"), "--row", "4", "--col", "5", "-k", "3"]
    here = told(command("query", database, *asked))
    assert here["index"] == "codebook"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert told(command("index", database, "--kind", "flat"))["keys"] == resumed["patches"]
    assert told(command("query", database, *asked, "--index", "codebook")) == here
    assert told(command("verify", database))["ok"] is True
    assert names_in(database) == sorted(names_in(database))
    assert not list(tmp_path.glob("?[3s]:"))
