"""Files of weights: which ones a folder means, what is read of them, and that nothing runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arrag_runtime.backends import load_backend
from arrag_runtime.backends.checkpoint import SAMPLE_GENERATOR
from arrag_runtime.faid.adapter import read_adapter
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.tokenizers import load_tokenizer
from arrag_runtime.weight_files import is_hub_id, read_tensors, weight_files

ONE, TWO = {"a.x": torch.zeros(2)}, {"a.y": torch.ones(2), "b.x": torch.ones(3)}


def names_in(folder: Path, prefix: str = "") -> set[str]:
    return set(read_tensors(weight_files(folder), prefix))


def test_a_folder_means_its_best_kind_of_file(tmp_path: Path) -> None:
    """safetensors before pytorch_model*.bin before other pickles; all files of the kind."""
    torch.save({"old": torch.zeros(1)}, tmp_path / "training.pth")
    assert names_in(tmp_path) == {"old"}
    torch.save(ONE, tmp_path / "other.bin")
    assert names_in(tmp_path) == {"a.x"}
    torch.save({"model": TWO, "steps": 3}, tmp_path / "pytorch_model.bin")
    assert names_in(tmp_path) == {"a.y", "b.x"}
    save_file(ONE, tmp_path / "1.safetensors")
    save_file(TWO, tmp_path / "2.safetensors")
    assert names_in(tmp_path) == {"a.x", "a.y", "b.x"}
    assert names_in(tmp_path, "a.") == {"x", "y"}


def test_an_index_says_which_files_hold_what_is_wanted(tmp_path: Path) -> None:
    """Files that it does not name are not read; where no name fits, all of its files are."""
    save_file(ONE, tmp_path / "1.safetensors")
    save_file({"stray": torch.zeros(1)}, tmp_path / "3.safetensors")
    index = {"weight_map": {"a.x": "1.safetensors", "b.x": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert weight_files(tmp_path, ("a.",)) == [one]
    assert weight_files(tmp_path) == weight_files(tmp_path, ("c.",)) == [one, two]
    with pytest.raises(BadInputError, match=r"2\.safetensors' is no file of weights"):
        read_tensors(weight_files(tmp_path))


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadInputError, match=r"index\.json' is damaged .*fetch it again") as caught:
        weight_files(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_pickle_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    with pytest.raises(BadInputError, match=r"a\.pt' is no file of weights that can be read"):
        read_tensors([tmp_path / "a.pt"])


class Bomb:
    """A pickle of it creates a folder when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def read_model(folder: Path) -> Any:
    """A generator's folder with everything but its weights, which are these."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SAMPLE_GENERATOR / name).read_bytes())
    return load_backend("janus", str(folder))


READERS: dict[str, Callable[[Path], Any]] = {
    "tokenizer": lambda folder: load_tokenizer("vq16", str(folder)),
    "generator": read_model,
    "adapter": read_adapter,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_that_would_run_code_does_not_run(reader: str, tmp_path: Path) -> None:
    """Whoever reads it refuses it in one line, and nothing of it has happened."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"model": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="can be read safely") as caught:
        READERS[reader](folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_hub_ids_are_owner_and_name() -> None:
    """With a revision or without; paths are none."""
    assert is_hub_id("owner/name.of-it@v1")
    assert not any(map(is_hub_id, ("name", "/owner/name", "owner/name/file", "owner/name@", "")))
