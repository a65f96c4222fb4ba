"""What docs/runtime.md and docs/api.md show is run as it stands there."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrag_runtime.format.specs import TokenizerSpec
from tests.worlds.captioned_world import CODES, DIMENSION, make_captioned

TEXT = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text()
API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which `mydb` is a database of 24 x 24 grids."""
    spec = TokenizerSpec("toy", 384, 24, 24, CODES, DIMENSION, "made up", "0" * 64)
    make_captioned(tmp_path / "mydb", spec=spec)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("at_home")
def test_daid_in_a_foreign_loop_takes_ten_lines() -> None:
    """The snippet fills every position, and its probabilities are what is sampled."""
    snippet = SNIPPETS[0]
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    positions: list[int] = []

    def my_model(grid: Any, position: int) -> torch.Tensor:
        positions.append(position)
        assert grid.shape == (2, 24, 24)
        return torch.full((2, CODES), 1 / CODES)

    names: dict[str, Any] = {"my_model": my_model, "batch": 2}
    torch.manual_seed(0)
    exec(snippet, names)
    assert positions == list(range(576))
    assert names["p"].shape == (2, CODES)
    np.testing.assert_allclose(names["p"].sum(dim=1), 1, atol=1e-5)
    assert names["grid"].max() < CODES
    assert len(np.unique(names["grid"])) > CODES // 2


def test_a_build_and_a_query_take_ten_lines(
    ray_session: None, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples run one after the other as they stand there, in a folder with pictures."""
    (tmp_path / "pictures").symlink_to(pictures)
    (tmp_path / "photo.jpg").symlink_to(pictures / "02.jpg")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", API, flags=re.DOTALL)
    lines = [line for line in examples[0].splitlines() if line and "import" not in line]
    assert len(lines) <= 10
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    assert len(names["answer"].results[0].neighbors) == 5
    assert names["receipt"].images == 1
    assert all(check.ok for check in names["checks"])
