"""The wheel: what is in it, and that its runtime works where a user's own modules have our names."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from arrag_runtime import Retriever
from tests.worlds.patch_world import World, build_index, make_world

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PACKAGES = ("arrag_runtime", "pipeline", "schemas", "stages")
THEIRS = ("schemas", "stages", "pipeline", "cli", "errors")
"""Names that a user's own modules may have."""
SEARCH = """
import json, sys
import numpy as np
from arrag_runtime import Retriever
import arrag_runtime

found = Retriever.open(sys.argv[1], k=5).at(np.load(sys.argv[2]), 3, 4)
print(json.dumps([arrag_runtime.__file__, arrag_runtime.__version__, found.patch_ids.tolist()]))
assert not set({names}) & set(sys.modules)
"""
WEIGHTS = """
import json
from arrag_runtime.backends import load_backend
from arrag_runtime.tokenizers import load_tokenizer

tokenizer, generator = load_tokenizer("sample"), load_backend("janus", "sample")
tokenizer.setup("cpu")
rows = len(tokenizer.codebook())
print(json.dumps([rows, generator.grid, generator.codebook().shape]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without the network from a copy of the checkout, with the setuptools that torch needs."""
    copy = tmp_path_factory.mktemp("source") / "arrag"
    aside = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "demo", "arrag-db")
    shutil.copytree(ROOT, copy, ignore=aside)
    built = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", built, copy)
    [made] = built.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small database with an exact index."""
    made = make_world(tmp_path_factory.mktemp("db"), 2, 4)
    build_index(made, "flat", kind="flat")
    return made


def test_the_wheel_holds_every_file_of_the_packages_and_no_tests(wheel: Path) -> None:
    """Code, bundled weights and pictures; both commands; the mark of typed packages."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        [commands] = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entries = archive.read(commands).decode()
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    here = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == here | {"cli.py"}
    assert held >= {f"{package}/py.typed" for package in PACKAGES}
    for ending in (".safetensors", ".jpg", ".json", "MODEL_CARD.md", "ATTRIBUTION.md"):
        assert any(name.endswith(ending) for name in held)
    assert "arrag-db = cli:main\n" in entries
    assert "arrag = cli:main_runtime" in entries


def test_bundled_weights_open_where_they_are_installed(installed: Path, tmp_path: Path) -> None:
    rows, grid, codebook = json.loads(_run(WEIGHTS, tmp_path, installed))
    assert grid == [24, 24]
    assert codebook[0] == rows


def test_the_runtime_searches_beside_a_users_own_modules(
    installed: Path, world: World, tmp_path: Path
) -> None:
    """None of theirs is imported: each raises, and the answer is the one this process gets."""
    for name in THEIRS:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is not ours to import')\n")
    grids = np.random.default_rng(3).integers(0, 24, (2, 7, 7)).astype(np.uint16)
    np.save(tmp_path / "grids.npy", grids)
    code = SEARCH.replace("{names}", repr(THEIRS))
    words = (world.layout.root, str(tmp_path / "grids.npy"))
    where, version, ids = json.loads(_run(code, tmp_path, installed, *words))
    assert Path(where).is_relative_to(installed)
    assert version not in ("", "0+unknown")
    expected = Retriever.open(world.layout.root, k=5).at(grids, 3, 4)
    assert expected is not None
    assert ids == expected.patch_ids.tolist()


def _pip(*words: str | Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def _run(code: str, folder: Path, installed: Path, *words: str) -> str:
    """What a script in a folder prints, with the installed wheel before the environment's packages."""
    (folder / "script.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "script.py", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
