"""ray_cluster.yaml is what Ray's launcher takes, and fits the command line and the packages."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """The file as `ray up` reads it, with Ray's defaults for the provider filled in."""
    given = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert isinstance(given, dict)
    config: dict[str, Any] = prepare_config(given)
    return config


def test_rays_own_schema_takes_it(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_rays_own_schema_refuses_what_is_misspelt(prepared: dict[str, Any]) -> None:
    """So the test above means something."""
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config({**prepared, "idle_timeout": 3})


def test_workers_come_when_needed_and_differ_in_what_they_declare(
    prepared: dict[str, Any],
) -> None:
    types = prepared["available_node_types"]
    assert prepared["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    for name in ("download", "encode"):
        assert types[name]["resources"] == {name: 1}
        assert types[name]["min_workers"] == 0
        assert types[name]["max_workers"] > 1
    assert types["encode"]["docker"]["worker_image"].endswith("-gpu")


def test_versions_are_those_that_were_tested_together(prepared: dict[str, Any]) -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    images = [prepared["docker"]["image"]]
    images.append(prepared["available_node_types"]["encode"]["docker"]["worker_image"])
    assert all(f"ray:{pinned['ray']}-py311-" in image for image in images)
    workers = prepared["available_node_types"]["encode"]["worker_setup_commands"]
    for commands in (prepared["head_setup_commands"], prepared["worker_setup_commands"], workers):
        [install] = [command for command in commands if "[build,cluster]" in command]
        assert install.endswith("-c /home/ray/arrag/constraints.txt")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"build", "cluster"} <= extras["optional-dependencies"].keys()


def test_every_node_asks_for_the_token(prepared: dict[str, Any]) -> None:
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        started = [line for line in prepared[commands] if "ray start" in line]
        assert len(started) == 1
        assert started[0].startswith("export RAY_AUTH_MODE=token;")
    assert prepared["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in "\n".join(prepared["head_start_ray_commands"])
