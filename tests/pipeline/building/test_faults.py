"""What goes wrong around a build: refusals that leave nothing, workers that die."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from arrag_runtime.format.errors import BadInputError
from pipeline.build import build
from schemas.settings.resources import RayResources
from tests.pipeline.conftest import settings
from tests.worlds.database_rows import assert_same_rows
from tests.worlds.processes import encoders


@pytest.mark.parametrize(
    ("resources", "precision", "message"),
    [
        (RayResources(gpus=1), None, "--gpus 1, but the Ray cluster declares 0"),
        (RayResources(workers=2, threads=2), None, "2 workers of 2 threads need more"),
        (RayResources(workers=2), "fp16", "unknown --precision 'fp16'"),
    ],
)
def test_a_refused_first_build_creates_nothing(
    ray_session: None,
    pictures: Path,
    tmp_path: Path,
    resources: RayResources,
    precision: str | None,
    message: str,
) -> None:
    """So the mended command starts from nothing, bound to none of the refused settings."""
    database = tmp_path / "db"
    with pytest.raises(BadInputError, match=message):
        build(settings(database, pictures, resources=resources, precision=precision))
    assert not database.exists()


@pytest.mark.slow
def test_a_worker_that_dies_costs_a_retry_and_no_row(
    ray_session: None, built: Path, pictures: Path, tmp_path: Path
) -> None:
    killed: list[int] = []
    over = threading.Event()

    def kill_two() -> None:
        while not over.is_set() and len(killed) < 2:
            for pid in encoders(os.getpid())[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_two)
    killer.start()
    try:
        report = build(settings(tmp_path / "db", pictures, hold_out=0.3))
    finally:
        over.set()
        killer.join()
    assert killed
    assert report.failed == {}
    assert_same_rows(built, tmp_path / "db")
