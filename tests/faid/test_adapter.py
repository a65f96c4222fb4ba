"""Adapter files: what is written comes back; the released checkpoint is imported without loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arrag_runtime.faid.adapter import (
    Adapter,
    AdapterSpec,
    model_codebook,
    read_adapter,
    spec_of_model,
    write_adapter,
)
from arrag_runtime.faid.attach import Faid, attach, attach_faid
from arrag_runtime.format.errors import BadInputError, IncompatibleError
from tests.worlds.janus_world import narrow_janus, some_retrieved, some_tokens, stirred

GRID, PROMPT, RANK = (5, 4), 3, 3


@torch.no_grad()
def logits(model: Any, faid: Faid, images: int = 2) -> Tensor:
    """What the model predicts of some tokens with FAiD and neighbours, [B, P, V]."""
    retrieved = some_retrieved(images, *GRID, faid.k)
    tokens = some_tokens(images, GRID[0] * GRID[1])
    words = torch.arange(images * PROMPT).view(images, PROMPT)
    inputs = [
        model.get_input_embeddings()(words),
        model.prepare_embeddings_for_image_generation(tokens),
    ]
    with faid.whole(retrieved, *GRID, start=PROMPT):
        hidden = model.model.language_model(inputs_embeds=torch.cat(inputs, 1)).last_hidden_state
    predicted: Tensor = model.model.generation_head(hidden)
    return predicted


def trained(model: Any, hops: tuple[int, ...] = (1, 2)) -> Adapter:
    """An adapter as training makes one: blenders, LoRA on one layer, another generation head."""
    faid = stirred(attach(model, hops, 2))
    faid.detach()
    tensors = {f"faid.{name}": t.clone() for name, t in faid.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    name = "model.language_model.layers.2.self_attn.v_proj"
    out, into = model.get_parameter(f"{name}.weight").shape
    tensors[f"lora.{name}.A"] = torch.randn(RANK, into, generator=generator)
    tensors[f"lora.{name}.B"] = torch.randn(out, RANK, generator=generator)
    head = "model.generation_head.vision_head.weight"
    tensors[head] = torch.randn(model.get_parameter(head).shape, generator=generator)
    spec = AdapterSpec(64, 4, 48, hops, 2, "softmax", lora_rank=RANK, lora_alpha=6)
    return Adapter(spec, tensors, model_codebook(model), {"steps": "7"})


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    adapter = trained(narrow_janus())
    write_adapter(tmp_path / "new" / "a.safetensors", adapter)
    read = read_adapter(tmp_path / "new" / "a.safetensors")
    assert (read.spec, read.about) == (adapter.spec, {"steps": "7"})
    assert read.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(read.tensors[name], t) for name, t in adapter.tensors.items())
    assert ((read.codebook * adapter.codebook).sum(1) > 0.99999).all()
    (file,) = (tmp_path / "new").iterdir()
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_attaching_puts_everything_in_place_and_detaching_takes_it_back(tmp_path: Path) -> None:
    model, by_hand = narrow_janus(), narrow_janus()
    adapter = trained(model)
    write_adapter(tmp_path / "a.safetensors", adapter)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    faid = attach_faid(model, tmp_path / "a.safetensors")
    expected = attach(by_hand, (1, 2), 2).eval()
    expected.load_state_dict(adapter.layer_tensors())
    ((name, (down, up)),) = adapter.lora_pairs().items()
    by_hand.get_parameter(f"{name}.weight").data += 6 / RANK * up @ down
    by_hand.model.generation_head.vision_head.weight.data = adapter.tensors[
        "model.generation_head.vision_head.weight"
    ]
    assert torch.equal(logits(model, faid), logits(by_hand, expected))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight", "model.generation_head.vision_head.weight"}
    assert not any(p.requires_grad for p in faid.parameters())
    faid.detach()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


OTHER_WIDTH = "made for hidden states of width 64, the model has 32"
OTHER_DEPTH = "made for decoder layers, 4, the model has 6"
OTHER_CODES = "made for image codes, 48, the model has 50"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"width": 32}, OTHER_WIDTH),
        ({"depth": 6}, OTHER_DEPTH),
        ({"codes": 50}, OTHER_CODES),
        ({"seed": 9}, "different codebooks"),
    ],
)
def test_an_adapter_for_another_model_is_refused(
    tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    write_adapter(tmp_path / "a.safetensors", trained(narrow_janus()))
    other = narrow_janus(**shape)
    with pytest.raises(IncompatibleError, match=message) as caught:
        attach_faid(other, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for m in other.modules())


def released_names(model: Any, faid: Faid) -> dict[str, Tensor]:
    """A full state dict as the released adapter has it: deepseek-ai's names, blenders in layers."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for ours, released in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.generation_head.proj_out.", "gen_head.output_mlp_projector."),
            ("model.generation_head.vision_head.", "gen_head.vision_head."),
            ("model.generation_aligner.fc1.", "gen_aligner.layers.0."),
            ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
            ("model.generation_embeddings.", "gen_embed."),
            ("model.vqmodel.quantize.", "gen_vision_model.quantize."),
            ("model.vision_model.", "vision_model.vision_tower."),
        ):
            if name.startswith(ours):
                theirs[released + name[len(ours) :]] = tensor.clone()
    for name, tensor in faid.state_dict().items():
        theirs[f"language_model.model.{name}"] = tensor.clone()
    theirs["aligner.layers.0.weight"] = torch.zeros(3)
    theirs["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    return theirs


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("hops", [(1,), (1, 2)])
def test_the_released_checkpoint_is_imported_without_loss(
    tmp_path: Path, hops: tuple[int, ...], suffix: str
) -> None:
    fine_tuned, base = narrow_janus(seed=5), narrow_janus(seed=6)
    base.model.vqmodel.load_state_dict(fine_tuned.model.vqmodel.state_dict())
    original = stirred(attach(fine_tuned, hops, 2))
    tensors = released_names(fine_tuned, original)
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        chosen = {name: tensors[name] for name in some}
        path = tmp_path / f"part-{number}.{suffix}"
        save_file(chosen, path) if suffix == "safetensors" else torch.save(chosen, path)
    adapter = read_adapter(tmp_path)
    assert adapter.spec == AdapterSpec(64, 4, 48, hops, 2)
    assert not adapter.lora_pairs()
    faid = attach_faid(base, tmp_path)
    assert torch.equal(logits(base, faid), logits(fine_tuned, original))
    ours = fine_tuned.state_dict()
    for part in ("model.language_model.", "lm_head.", "model.generation_"):
        for name in (name for name in ours if name.startswith(part)):
            assert torch.equal(adapter.tensors[name], ours[name]), name
    # Written as an adapter of our own it is the same one.
    write_adapter(tmp_path / "own.safetensors", adapter)
    again = read_adapter(tmp_path / "own.safetensors")
    assert again.spec == adapter.spec
    assert all(torch.equal(again.tensors[name], t) for name, t in adapter.tensors.items())


def test_checkpoints_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    model = narrow_janus()
    faid = attach(model)
    faid.detach()
    tensors = released_names(model, faid)
    plain = {name: t for name, t in tensors.items() if "blender" not in name}
    plain = {name: t for name, t in plain.items() if "retrieval" not in name}
    save_file(plain, tmp_path / "plain.safetensors")
    with pytest.raises(BadInputError, match="holds no blender, so it is no FAiD adapter"):
        read_adapter(tmp_path / "plain.safetensors")
    save_file({**tensors, "encoder.weight": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(BadInputError, match=r"holds 'encoder\.weight', which no Janus checkpoint"):
        read_adapter(tmp_path / "odd.safetensors")
    moved = {name.replace("layers.2.blender", "layers.3.blender"): t for name, t in tensors.items()}
    moved = {n.replace("layers.2.retrieval", "layers.3.retrieval"): t for n, t in moved.items()}
    save_file(moved, tmp_path / "moved.safetensors")
    with pytest.raises(IncompatibleError, match=r"augments layers \[0, 3\], but 2 blenders in 4"):
        read_adapter(tmp_path / "moved.safetensors")


def test_files_that_are_gone_or_damaged_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no adapter at 'gone'; give a file that"):
        read_adapter("gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="it holds none of"):
        read_adapter(tmp_path / "empty")
    path = tmp_path / "a.safetensors"
    write_adapter(path, trained(narrow_janus()))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match="is damaged or incomplete") as caught:
        read_adapter(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    tensors, model = load_file(path), narrow_janus()
    del tensors["faid.layers.2.blender.conv1.bias"]
    metadata = {"format": "1", "about": "{}", "codebook": ""}
    fields = vars(trained(model).spec)
    save_file(tensors, path, metadata=metadata | {"adapter": json.dumps(fields)})
    with pytest.raises(BadInputError, match="does not hold what it says") as caught:
        attach_faid(model, path)
    assert "\n" not in str(caught.value)
    save_file(tensors, path, metadata=metadata | {"format": "2", "adapter": json.dumps(fields)})
    with pytest.raises(IncompatibleError, match="of format 2, not 1"):
        read_adapter(path)


def test_the_shape_of_a_model_is_read_off_its_configuration() -> None:
    assert spec_of_model(narrow_janus(depth=6)) == AdapterSpec(64, 6, 48)
