"""Checkpoints of Janus: both layouts, what is wrong with them, and memory that does not suffice."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from arrag_runtime import device, generate
from arrag_runtime.backends import load_backend
from arrag_runtime.backends.checkpoint import read_checkpoint
from arrag_runtime.device import out_of_memory
from arrag_runtime.format.errors import BadInputError
from tests.worlds.narrow_janus import narrow_janus, save_checkpoint, text_tokenizer

State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def words() -> Any:
    return text_tokenizer()


@pytest.fixture(scope="module")
def model(words: Any) -> Any:
    return narrow_janus(words, seed=1)


@pytest.fixture(scope="module")
def folder(model: Any, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in transformers' layout. Read only."""
    return save_checkpoint(tmp_path_factory.mktemp("janus") / "model", model, words)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def original_names(state: State) -> dict[str, torch.Tensor]:
    """The state as deepseek-ai's MultiModalityCausalLM names it, with what it has besides."""
    renamed: dict[str, torch.Tensor] = {
        "gen_vision_model.quantize.codebook_used": torch.zeros(65536),
        "vision_model.vision_tower.attn_pool.latent": torch.zeros(1, 1, 64),
    }
    plain = {
        "lm_head.weight": "language_model.lm_head.weight",
        "model.generation_embeddings.weight": "gen_embed.weight",
    }
    prefixes = {
        "model.language_model.": "language_model.model.",
        "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
        "model.generation_aligner.hidden_layers.0.": "gen_aligner.layers.2.",
        "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
        "model.generation_head.vision_head.": "gen_head.vision_head.",
        "model.aligner.fc1.": "aligner.layers.0.",
        "model.aligner.hidden_layers.0.": "aligner.layers.2.",
        "model.vision_model.embeddings.patch_embedding.": "vision_model.vision_tower.patch_embed.proj.",
        "model.vision_model.post_layernorm.": "vision_model.vision_tower.norm.",
    }
    inside = {"block_1": "0", "attn_1": "1", "block_2": "2"}
    for name, tensor in state.items():
        if name in plain:
            renamed[plain[name]] = tensor
        elif prefix := next((p for p in prefixes if name.startswith(p)), None):
            renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
        elif name.startswith("model.vqmodel."):
            parts = name.removeprefix("model.vqmodel.").split(".")
            if parts[1] in ("down", "up"):
                parts[1] = "conv_blocks"
                parts[3] = "res" if parts[3] == "block" else parts[3]
            if parts[1] == "mid":
                parts[2] = inside[parts[2]]
            renamed["gen_vision_model." + ".".join(parts)] = tensor
        elif name.endswith("position_embedding.weight"):
            renamed["vision_model.vision_tower.pos_embed"] = tensor[None]
        else:
            renamed |= tower_names(name, tensor, state)
    return renamed


def tower_names(name: str, tensor: torch.Tensor, state: State) -> dict[str, torch.Tensor]:
    """A tensor of the vision tower's blocks, as timm names it; queries, keys, values in one."""
    found = re.fullmatch(r"model\.vision_model\.encoder\.layers\.(\d+)\.(.*)", name)
    assert found, name
    block, rest = f"vision_model.vision_tower.blocks.{found[1]}.", found[2]
    if rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
        return {}
    if rest.startswith("self_attn.q_proj"):
        three = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
        return {f"{block}attn.qkv.{rest.rpartition('.')[2]}": torch.cat(three)}
    rest = rest.replace("self_attn.projection_layer", "attn.proj").replace("layer_norm", "norm")
    return {block + rest: tensor}


def original_config(model: Any) -> dict[str, Any]:
    """The parts of deepseek-ai's config.json that a loader needs."""
    text = model.config.text_config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    )
    return {
        "model_type": "multi_modality",
        "language_config": {name: getattr(text, name) for name in names},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 24, "n_embed": 4}},
    }


def test_the_original_layout_loads_bit_for_bit(model: Any, words: Any, tmp_path: Path) -> None:
    """Every tensor, the vision tower's too, comes back under transformers' names."""
    names = original_names(model.state_dict())
    assert not set(names) & set(model.state_dict())
    torch.save(names, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(original_config(model)))
    words.save_pretrained(tmp_path)
    loaded = load_backend("janus", str(tmp_path))
    state, wanted = loaded.model.state_dict(), model.state_dict()
    assert set(state) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    assert loaded.grid == (7, 7)
    same_logits(loaded, model, words)


def test_transformers_layout_loads_bit_for_bit(folder: Path, model: Any, words: Any) -> None:
    """As saved; bfloat16 where it is asked for."""
    loaded = load_backend("janus", str(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    same_logits(loaded, model, words)
    half = load_backend("janus", str(folder), precision="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.start(["a hat"], guided=True).forward(None).dtype == torch.bfloat16


def same_logits(loaded: Any, model: Any, words: Any) -> None:
    """The loaded model says what the one in memory says."""
    from arrag_runtime.backends.janus import JanusBackend

    ours = JanusBackend(model, words, "memory").start(["a hat"], guided=True)
    assert torch.equal(loaded.start(["a hat"], guided=True).forward(None), ours.forward(None))


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A change of a folder's tensors."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return apply


def drop_begin_of_image(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<begin_of_image>", "<elsewhere>"))


HEAD = "model.generation_head.vision_head.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as a Janus checkpoint"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "of type 'llama'"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (drop_begin_of_image, "no token for <begin_of_image>"),
        (lambda f: (f / "model.safetensors").unlink(), r"no \.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"no weights" * 9),
            "no file of weights that can be read safely",
        ),
        (rewrite(lambda s: s.pop(HEAD)), rf"1 tensors are missing.*'{HEAD}'"),
        (rewrite(lambda s: s.update(extra=torch.zeros(2))), "unknown or of another shape.*'extra'"),
        (
            rewrite(lambda s: s.update({HEAD: torch.zeros(3, 4)})),
            "does not fit its own config.json|no Janus model that fits",
        ),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    damage: Callable[[Path], object], message: str, copied: Path
) -> None:
    """The folder and what is wrong with it."""
    damage(copied)
    with pytest.raises(BadInputError, match=message) as caught:
        load_backend("janus", str(copied))
    assert "\n" not in str(caught.value)
    assert str(copied) in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: load_backend("janus", "/nowhere/model"), r"no model at '/nowhere/model'.*hub id"),
        (lambda: load_backend("showo", "sample"), "unknown generator 'showo'; choose one of janus"),
        (lambda: load_backend("janus", "x", precision="int4"), "unknown precision 'int4'"),
    ],
)
def test_names_that_mean_nothing_are_refused(wrong: Callable[[], Any], message: str) -> None:
    """With what may be given instead."""
    with pytest.raises(BadInputError, match=message):
        wrong()


def test_without_a_gpu_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInputError, match=r"device 'cuda' is not available.*--device cpu"):
        load_backend("janus", "sample", device="cuda")


@pytest.mark.parametrize("reference", ["deepseek-community/Janus-Pro-1B", "some/repo@abc123"])
def test_without_a_network_the_hub_is_one_clear_line(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository and the way around are named."""
    asked = {}

    def unreachable(repo: str, *, revision: str, **_: object) -> str:
        asked[repo] = revision
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(BadInputError, match=rf"cannot fetch {reference}.*hf auth login") as caught:
        load_backend("janus", reference)
    assert "\n" not in str(caught.value)
    repo, _, revision = reference.partition("@")
    assert asked == {repo: revision or "main"}


def test_a_hub_id_is_a_folder_once_it_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot is loaded like any folder."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert load_backend("janus", "owner/name").name == "owner/name"


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes and what to do; on a CPU the system would end the process without a word."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      100 kB\n")
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(
        BadInputError, match=r"takes .* GiB, but cpu has 0\.0 GiB free; use a smaller"
    ):
        load_backend("janus", str(folder))
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "none")
    assert device.available_memory("cpu") is None
    load_backend("janus", str(folder))


def test_the_parameters_are_counted_without_making_them(folder: Path, model: Any) -> None:
    """The number that the memory is asked for."""
    counted = read_checkpoint(str(folder)).parameters
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_line(error: Exception) -> None:
    """However the library says it; other errors stay what they are."""
    too_little = pytest.raises(BadInputError, match="too little memory for decoding; use fewer")
    with too_little, out_of_memory("decoding"):
        raise error
    with pytest.raises(RuntimeError, match="shape"), out_of_memory("decoding"):
        raise RuntimeError("shape mismatch")


def test_a_folder_says_how_it_is_sampled(copied: Path) -> None:
    """Guidance and temperature of its generation_config.json, unless others are asked for."""
    asked = {"guidance_scale": 2.5, "temperature": 0.7}
    (copied / "generation_config.json").write_text(json.dumps(asked))
    loaded = load_backend("janus", str(copied))
    assert (loaded.guidance, loaded.temperature) == (2.5, 0.7)
    silent = generate(loaded, "a hat").tokens
    assert (silent == generate(loaded, "a hat", guidance=2.5, temperature=0.7).tokens).all()
    assert (silent != generate(loaded, "a hat", guidance=5.0, temperature=1.0).tokens).any()
    (copied / "generation_config.json").unlink()
    plain = load_backend("janus", str(copied))
    assert (plain.guidance, plain.temperature) == (5.0, 1.0)
