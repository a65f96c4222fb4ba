"""Weights files: the same tokenizer from every layout, one clear line for what is none."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.tokenizers import Tokenizer, load_tokenizer
from tests.conftest import narrow_model, pixels

State = Mapping[str, torch.Tensor]
PICTURE = pixels(5)[None]


def llamagen_names(state: State) -> dict[str, torch.Tensor]:
    """The state as LlamaGen's VQModel names it, with the counter it keeps of used codes."""
    renamed = {"quantize.codebook_used": torch.zeros(65536)}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] in ("down", "up"):
            parts[1] = "conv_blocks"
            parts[3] = "res" if parts[3] == "block" else parts[3]
        if parts[1] == "mid":
            parts[2] = {"block_1": "0", "attn_1": "1", "block_2": "2"}[parts[2]]
        renamed[".".join(parts)] = tensor
    return renamed


def beside_others(prefix: str, state: State) -> dict[str, torch.Tensor]:
    """The state below a prefix, beside tensors of other parts of a checkpoint."""
    others = ("model.language_model.embed_tokens.weight", "quant_conv.weight", "lm_head.weight")
    return {prefix + k: v.clone() for k, v in state.items()} | {n: torch.ones(2) for n in others}


def write_safetensors(state: State, root: Path) -> Path:
    save_file(dict(state), root / "vq.safetensors")
    return root / "vq.safetensors"


def write_llamagen(state: State, root: Path) -> Path:
    torch.save({"model": llamagen_names(state), "steps": 300000}, root / "vq_ds16_t2i.pt")
    return root / "vq_ds16_t2i.pt"


def write_janus(state: State, root: Path) -> Path:
    """A Janus-Pro folder in two shards, with an index, and a third shard without the tokenizer."""
    tensors = beside_others("model.vqmodel.", state)
    names = sorted(tensors)
    at = names.index("model.vqmodel.encoder.conv_out.bias")
    shards = {"model-1.safetensors": names[:at], "model-2.safetensors": names[at:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, root / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    weight_map["model.vision_model.x"] = "model-3-is-not-here.safetensors"
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


def write_deepseek(state: State, root: Path) -> Path:
    tensors = beside_others("gen_vision_model.", llamagen_names(state))
    torch.save(tensors, root / "pytorch_model.bin")
    (root / "config.json").write_text("{}")
    return root


LAYOUTS = (write_safetensors, write_llamagen, write_janus, write_deepseek)
SHAPES = {"flat": ((1, 1, 1, 1, 1), 1), "vq16": ((1, 1, 2, 2, 4), 2)}


def ids_of(made: Tokenizer) -> Any:
    made.setup("cpu", precision="float32")
    return made.encode(PICTURE).tokens


@pytest.fixture(scope="module", params=SHAPES)
def state(request: pytest.FixtureRequest) -> State:
    """The tensors of a narrow model: five equal levels, and VQ-16's own shape."""
    made: State = narrow_model(*SHAPES[request.param], seed=1).state_dict()
    return made


def test_every_layout_gives_the_same_ids(state: State, tmp_path: Path) -> None:
    """transformers' file, LlamaGen's, Janus-Pro in shards and deepseek's layout are one."""
    expected: Any = None
    for write in LAYOUTS:
        root = tmp_path / write.__name__
        root.mkdir()
        path = write(state, root)
        made = load_tokenizer("vq16", str(path))
        ids = ids_of(made)
        expected = ids if expected is None else expected
        assert np.array_equal(ids, expected), write.__name__
        assert made.weights == str(path.resolve())
        assert made.spec.preparation == "shorter side 384 antialiased bilinear, centre crop"
        assert re.fullmatch("[0-9a-f]{64}", made.spec.weights_sha256)
    assert len(np.unique(expected)) > 20


def test_a_picture_encodes_to_what_the_renamed_model_says(tmp_path: Path) -> None:
    """Two blocks of one level swapped give other ids, so the mapping of names is really tested."""
    original = narrow_model(*SHAPES["vq16"], seed=1).state_dict()
    swapped = {
        re.sub(
            r"(encoder\.down\.1\.block)\.([01])\.", lambda m: f"{m[1]}.{1 - int(m[2])}.", name
        ): t
        for name, t in original.items()
    }
    right = ids_of(load_tokenizer("vq16", str(write_safetensors(original, tmp_path))))
    wrong = ids_of(load_tokenizer("vq16", str(write_safetensors(swapped, tmp_path))))
    assert (right != wrong).any()


def test_the_recorded_weights_load_the_same_tokenizer_again(
    narrow_weights: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is recorded in full, so another working folder finds it too."""
    monkeypatch.chdir(narrow_weights.parent)
    made = load_tokenizer("vq16", narrow_weights.name)
    monkeypatch.chdir("/")
    assert made.weights is not None
    assert load_tokenizer("vq16", made.weights).spec == tokenizer.spec


def test_a_float16_file_is_the_same_tokenizer(
    tokenizer: Tokenizer, model: Any, tmp_path: Path
) -> None:
    """The spec differs in the file's hash alone; half precision on disk moves few ids."""
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    made = load_tokenizer("vq16", str(write_safetensors(halves, tmp_path)))
    assert made.spec.fingerprint() == tokenizer.spec.fingerprint()
    assert made.spec.weights_sha256 != tokenizer.spec.weights_sha256
    assert (ids_of(made) == tokenizer.encode(PICTURE).tokens).mean() > 0.9


CODEBOOK = {"quantize.embedding.weight": torch.zeros(16, 8)}
STEM = {
    "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
    "quant_conv.weight": torch.zeros(8, 32, 1, 1),
}


def write_index(path: Path, content: str) -> None:
    path.mkdir()
    (path / "model.safetensors.index.json").write_text(content)


WRONG: dict[str, Any] = {
    "other.safetensors": lambda path: save_file({"a": torch.zeros(3)}, path),
    "codebook.safetensors": lambda path: save_file(CODEBOOK, path),
    "stem.safetensors": lambda path: save_file(CODEBOOK | STEM, path),
    "junk.safetensors": lambda path: path.write_bytes(b"junk" * 99),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "other.pt": lambda path: torch.save({"a": torch.zeros(3)}, path),
    "tensor.pt": lambda path: torch.save(torch.zeros(3), path),
    "list.pt": lambda path: torch.save([1, 2], path),
    "junk.pt": lambda path: path.write_bytes(b"junk"),
    "picture.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "empty-folder": lambda path: path.mkdir(),
    "no-index": lambda path: write_index(path, "{"),
    "no-map": lambda path: write_index(path, "{}"),
    "no-shard": lambda path: write_index(path, '{"weight_map": {"model.vqmodel.x": "x.safetensors"}}'),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_tokenizer_is_one_clear_line(name: str, tmp_path: Path) -> None:
    """Whatever it holds, the message names it, in one line."""
    WRONG[name](tmp_path / name)
    with pytest.raises(BadInputError, match=re.escape(name)) as caught:
        load_tokenizer("vq16", str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_path_says_what_may_be_given(tmp_path: Path) -> None:
    """The path, and the kinds of weights that are accepted."""
    with pytest.raises(BadInputError, match=r"nothing\.pt'.*safetensors.*hub id"):
        load_tokenizer("vq16", str(tmp_path / "nothing.pt"))


@pytest.mark.parametrize("weights", [None, "deepseek-community/Janus-Pro-1B", "some/repo@abc123"])
def test_without_a_network_the_hub_is_one_clear_line(
    weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository and the way around are named."""

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    repository = (weights or "peizesun/llamagen_t2i").partition("@")[0]
    with pytest.raises(BadInputError, match=rf"{repository}.*--tokenizer-weights") as caught:
        load_tokenizer("vq16", weights)
    assert "\n" not in str(caught.value)


def test_a_hub_checkpoint_is_recorded_with_its_commit(
    narrow_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a manifest keeps names the commit that was fetched, not the branch asked for."""
    commit = "0123abcd" * 5
    asked: list[str] = []

    def fetched(repository: str, *, revision: str, **_: object) -> str:
        asked.append(f"{repository}@{revision}")
        (tmp_path / commit).mkdir(exist_ok=True)
        (tmp_path / commit / "model.safetensors").write_bytes(narrow_weights.read_bytes())
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    made = load_tokenizer("vq16", "owner/name")
    assert made.weights == f"owner/name@{commit}"
    assert load_tokenizer("vq16", made.weights).spec == made.spec
    assert asked == ["owner/name@main", f"owner/name@{commit}"]
