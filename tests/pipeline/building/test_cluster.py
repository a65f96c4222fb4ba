"""Clusters: steps keep to their nodes, a node that goes costs no row, jobs are submitted."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arrag_runtime.format.errors import BadInputError
from pipeline.resources.ray_session import EncoderPool, encoder_pool
from schemas.settings.resources import RayResources
from tests.worlds.database_rows import assert_same_rows
from tests.worlds.servers.s3_server import free_port

ROOT = Path(__file__).parents[3]
RAY = Path(sys.executable).with_name("ray")
PATIENCE = 240.0


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (RayResources(read_resource="download"), "--read-resource download, but no node"),
        (RayResources(encode_resource="encode"), r"""--resources '{"encode": 1}'"""),
        (RayResources(gpus=2), "--gpus 2, but the Ray cluster declares 0"),
    ],
)
def test_what_no_node_declares_is_refused(
    ray_session: None, resources: RayResources, message: str
) -> None:
    with pytest.raises(BadInputError) as caught:
        encoder_pool(resources)
    assert message in str(caught.value)
    assert "--autoscale" in str(caught.value)


def test_a_cluster_that_grows_may_lack_what_comes_later(ray_session: None) -> None:
    later = RayResources(gpus=8, autoscale=True, encode_resource="encode")
    assert encoder_pool(later) == EncoderPool(1, 8)
    assert encoder_pool(RayResources(workers=9, autoscale=True)) == EncoderPool(2, 9)
    assert encoder_pool(RayResources(workers=1, autoscale=True)) == EncoderPool(1, 1)


EMBEDDED = """
import os, ray
from pipeline.resources.ray_session import ray_cluster
from schemas.settings.resources import RayResources
with ray_cluster(RayResources()):
    print(ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


@pytest.mark.slow
def test_an_embedded_cluster_has_the_priority_of_its_command() -> None:
    """Ray itself would give its workers the lowest but four."""
    command = ["nice", "-n", "3", sys.executable, "-c", EMBEDDED]
    unset = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    run = subprocess.run(command, capture_output=True, text=True, env=unset, check=True)
    assert run.stdout.split() == ["3"]


@pytest.mark.slow
def test_nodes_differ_and_one_of_them_goes(built: Path, pictures: Path, tmp_path: Path) -> None:
    """The same rows as on one machine, each step on nodes that declare what it asks for."""
    log = tmp_path / "log"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.worlds.three_nodes",
            str(tmp_path / "db"),
            str(pictures),
            str(log),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    # Ray may print of the node that went after the script has had its say.
    told = json.loads(next(line for line in reversed(run.stdout.splitlines()) if line[:1] == "{"))
    assert told["failed"] == {}
    assert_same_rows(built, tmp_path / "db")
    steps = [line.split() for line in log.read_text().splitlines()]
    assert {node for kind, node in steps if kind == "read"} == set(told["reader"])
    assert {node for kind, node in steps if kind == "encode"} <= set(told["encoders"])
    assert len(told["encoders"]) == 3


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head of its own that takes jobs from who has the token; the environment to submit in."""
    token = tmp_path / "auth_token"
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard, port = free_port(), free_port()
    # Not below the test's own folder: paths of Ray's sockets must be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    options = ["--head", "--block", "--disable-usage-stats", "--num-cpus=2", f"--port={port}"]
    options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    options += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"]
    options += [f"--ray-client-server-port={free_port()}", "--include-dashboard=true"]
    started = subprocess.Popen(
        [str(RAY), "start", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_it_answers(address, environment, started)
        yield environment | {"RAY_ADDRESS": address}
    finally:
        started.terminate()
        started.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(
    address: str, environment: dict[str, str], head: subprocess.Popen[bytes]
) -> None:
    end = time.monotonic() + PATIENCE
    asked = [str(RAY), "job", "list", "--address", address]
    while subprocess.run(asked, env=environment, capture_output=True, check=False).returncode:
        if head.poll() is not None or time.monotonic() > end:
            pytest.fail("the head did not start")
        time.sleep(1)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the code alone, as the working folder of jobs."""
    folder = tmp_path / "code"
    for name in ("schemas", "stages", "pipeline", "arrag_runtime"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.copy(ROOT / "cli.py", folder)
    return folder


def submit(
    head: dict[str, str], code: Path, pictures: Path, database: str
) -> subprocess.CompletedProcess[str]:
    """A build as a job; its output, when it has ended."""
    build = [sys.executable, "cli.py", "build", "--source", "folder", "--input", str(pictures)]
    build += ["--db", database, "--shard-size", "4", "--hold-out", "0.3", "--workers", "1"]
    command = [str(RAY), "job", "submit", "--working-dir", str(code), "--"]
    return subprocess.run(
        [*command, *build, "--no-index", "-q"],
        env=head,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_build_is_submitted_as_a_job(
    head: dict[str, str], code: Path, built: Path, pictures: Path, tmp_path: Path
) -> None:
    """To the job's own cluster, which it finds by itself; and only with the token."""
    done = submit(head, code, pictures, str(tmp_path / "db"))
    assert done.returncode == 0, done.stdout
    assert_same_rows(built, tmp_path / "db")
    lost = submit(head, code, pictures, "db-in-the-copy")
    assert lost.returncode != 0
    assert "is in this job's own copy of the working folder" in lost.stdout
    stranger = head | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    refused = submit(stranger, code, pictures, str(tmp_path / "other"))
    assert refused.returncode != 0
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_missing_token_is_one_line(tmp_path: Path) -> None:
    """Whoever has none is told what to look at, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        build = ["build", "--source", "sample", "--db", str(tmp_path / "db"), "--ray", address]
        strange = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
        unset = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        run = subprocess.run(
            [sys.executable, "-m", "cli", *build],
            env=unset | strange,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 1
    [line] = run.stderr.splitlines()
    assert line.startswith(f"error: cannot reach a Ray cluster at '{address}'")
    assert "token" in line
    assert not (tmp_path / "db").exists()
