"""deepseek-ai's original layout of Janus-Pro, mapped to transformers' names.

`_NAMES` lists what is only renamed. The tokenizer of pictures, `gen_vision_model`, is LlamaGen's
VQ-16 (`tokenizers.vq16`); the vision tower has queries, keys and values in one tensor `qkv`, and
positions [1, N, D] that are [N, D] in transformers.

The vision tower is for understanding pictures; generation never calls it. Widths are read off the
weights, so narrow models load the same way; the tower's heads, which weights do not tell, are 64
wide as SigLIP's.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from arrag_runtime.tokenizers.vq16 import CODEBOOK_USED, transformers_name
from arrag_runtime.tokenizers.vq_model import VQShape
from arrag_runtime.weight_files import Tensors

_VQ = "gen_vision_model."
_TOWER = r"^vision_model\.vision_tower\."
_LAYERS = "model.vision_model.encoder.layers."
_NAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.vision_head\.", "model.generation_head.vision_head."),
    (_TOWER + r"patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (_TOWER + r"pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
    (_TOWER + r"norm\.", "model.vision_model.post_layernorm."),
    (_TOWER + r"blocks\.(\d+)\.norm(\d)\.", _LAYERS + r"\1.layer_norm\2."),
    (_TOWER + r"blocks\.(\d+)\.attn\.proj\.", _LAYERS + r"\1.self_attn.projection_layer."),
    (_TOWER + r"blocks\.(\d+)\.attn\.", _LAYERS + r"\1.self_attn."),
    (_TOWER + r"blocks\.", _LAYERS),
)
_ALIGNER = re.compile(r"^(gen_aligner|aligner)\.layers\.(\d+)\.(weight|bias)$")


def to_transformers_names(state: Mapping[str, torch.Tensor]) -> Tensors:
    """A state dict in deepseek-ai's names as one in transformers' names; unknown names stay."""
    renamed: Tensors = {}
    for name, tensor in state.items():
        if name == _VQ + CODEBOOK_USED or re.match(_TOWER + r"attn_pool\.", name):
            continue
        new = janus_name(name)
        if ".self_attn.qkv." in new:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[new.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            place = new.endswith("position_embedding.weight")
            renamed[new] = tensor.reshape(tensor.shape[-2:]) if place else tensor
    return renamed


def janus_name(name: str) -> str:
    """deepseek-ai's name of a tensor as transformers' JanusForConditionalGeneration has it.

    One that no Janus checkpoint of deepseek-ai's has stays as it is.
    """
    if name.startswith(_VQ):
        return f"model.vqmodel.{transformers_name(name.removeprefix(_VQ))}"
    if aligner := _ALIGNER.match(name):
        which, number, kind = aligner.groups()
        layer = "fc1" if number == "0" else f"hidden_layers.{int(number) // 2 - 1}"
        return f"model.{which.replace('gen_', 'generation_')}.{layer}.{kind}"
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name


def original_config(fields: Mapping[str, Any], state: Tensors, tokenizer: Any) -> Any:
    """The JanusConfig of an original checkpoint: its `config.json`, and widths off its tensors.

    state: in transformers' names.
    """
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    language = fields["language_config"]
    known = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "vocab_size",
    )
    text = LlamaConfig(
        **{name: language[name] for name in known if name in language},
        rope_parameters={"rope_type": "default", "rope_theta": language.get("rope_theta", 10000.0)},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    embeddings = "model.vision_model.embeddings."
    width, _, patch, _ = state[f"{embeddings}patch_embedding.weight"].shape
    places = state[f"{embeddings}position_embedding.weight"].shape[0]
    vision = JanusVisionConfig(
        hidden_size=width,
        num_hidden_layers=_count(state, re.escape(_LAYERS) + r"(\d+)\."),
        num_attention_heads=max(1, width // 64),
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        mlp_ratio=state[f"{_LAYERS}0.mlp.fc1.weight"].shape[0] / width,
        projection_dim=state["model.aligner.fc1.weight"].shape[0],
        depth=1 + _count(state, r"model\.aligner\.hidden_layers\.(\d+)\."),
    )
    shape = VQShape.of({name.removeprefix("model.vqmodel."): t for name, t in state.items()})
    projected, embedded = state["model.generation_head.proj_out.weight"].shape
    vq = JanusVQVAEConfig(
        embed_dim=shape.dimension,
        num_embeddings=shape.codes,
        latent_channels=shape.latent,
        base_channels=shape.base,
        channel_multiplier=[width // shape.base for width in shape.widths],
        num_res_blocks=shape.blocks,
        projection_dim=projected,
        num_hidden_layers=1 + _count(state, r"model\.generation_aligner\.hidden_layers\.(\d+)\."),
        image_token_embed_dim=embedded,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )


def _count(state: Tensors, pattern: str) -> int:
    """How many numbers stand where `pattern` has its group."""
    return len({m[1] for name in state if (m := re.match(pattern, name))})
