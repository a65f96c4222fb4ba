"""Files of weights: where they are, and their tensors, read without running code from them.

In: a file, a folder or a hub id. Out: tensors by name, on the CPU. Everything in this project that
reads weights of tokenizers, generators and adapters reads them here.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from arrag_runtime.format.errors import BadInputError

Tensors = dict[str, torch.Tensor]
_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin")


def is_hub_id(reference: str) -> bool:
    """Whether this is spelled as a hub id, `owner/name[@revision]`."""
    return _HUB_ID.fullmatch(reference) is not None


def fetch(reference: str, *, instead: str, file: str | None = None) -> tuple[Path, str]:
    """Fetch a hub id; returns the local path and `owner/name@commit` as really fetched.

    file: the one to fetch, None for a folder of all weights and descriptions. instead: what to give
    where the hub is out of reach, for the message of the BadInputError.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, _, revision = reference.partition("@")
    revision = revision or "main"
    try:
        if file:
            path = Path(hf_hub_download(repo, file, revision=revision))
        else:
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_HUB_FILES]))
    except Exception as error:
        raise BadInputError(
            f"cannot fetch {repo}@{revision} from the hub ({type(error).__name__}); check the"
            f" network and your token (`hf auth login`), or give {instead}"
        ) from error
    return path, f"{repo}@{(path.parent if file else path).name}"


def weight_files(path: Path, prefixes: tuple[str, ...] = ("",)) -> list[Path]:
    """The files that hold the weights at a path: itself, or a folder's.

    prefixes: of the names that are wanted; an index of a folder tells which files hold them.
    Raises BadInputError for a folder without weights.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise BadInputError(f"'{index}' is damaged ({error}); fetch it again") from error
        held = {file for name, file in weight_map.items() if name.startswith(prefixes)}
        return sorted(path / file for file in held or set(weight_map.values()))
    for pattern in _PATTERNS:
        if files := sorted(path.glob(pattern)):
            return files
    raise BadInputError(
        f"'{path}' has no .safetensors or other file of weights; it holds none of"
        f" {', '.join(_PATTERNS)}"
    )


def read_tensors(files: Sequence[Path], prefix: str = "") -> Tensors:
    """The tensors of files whose names begin with `prefix`, by the rest of their names.

    Other tensors of a safetensors file stay on disk. Raises BadInputError for a file that cannot be
    read safely.
    """
    tensors: Tensors = {}
    for file in files:
        try:
            found = _read(file, prefix)
        except Exception as error:
            raise BadInputError(
                f"'{file}' is no file of weights that can be read safely:"
                f" {next(iter(str(error).splitlines()), type(error).__name__)}"
            ) from error
        if not isinstance(found, dict):
            raise BadInputError(f"'{file}' holds a {type(found).__name__}, not a model's weights")
        for name, value in found.items():
            if isinstance(value, torch.Tensor) and name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = value
    return tensors


def _read(file: Path, prefix: str) -> Any:
    """What a file holds: of torch's own a state dict, also one in a training's checkpoint."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    return loaded
