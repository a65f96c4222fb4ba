"""A narrow Janus of the real classes, and FAiD on it by loops to check against."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from arrag_runtime.faid.attach import Faid
from arrag_runtime.format.neighborhood import MISSING

WIDTH, DEPTH, CODES, WORDS = 64, 4, 48, 96


def narrow_janus(seed: int = 0, width: int = WIDTH, depth: int = DEPTH, codes: int = CODES) -> Any:
    """A JanusForConditionalGeneration with random weights, biases included, in evaluation mode."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(
            JanusConfig(
                text_config=LlamaConfig(
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=depth,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    vocab_size=WORDS,
                    attn_implementation="eager",
                ),
                vision_config=JanusVisionConfig(
                    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=width
                ),
                vq_config=JanusVQVAEConfig(
                    embed_dim=8,
                    num_embeddings=codes,
                    latent_channels=32,
                    base_channels=32,
                    channel_multiplier=[1, 1, 1, 1, 1],
                    num_res_blocks=1,
                    projection_dim=width,
                    image_token_embed_dim=width,
                ),
            )
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.model.generation_embeddings.weight.data.normal_()
        return model.eval()


def stirred(faid: Faid, seed: int = 1) -> Faid:
    """The same with every weight moved, so that no bias is zero and no norm or hop weight is one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in faid.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return faid.eval()


def some_tokens(images: int, positions: int, seed: int = 2) -> Tensor:
    """Image tokens, long [B, P]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, CODES, (images, positions)))


def some_retrieved(images: int, height: int, width: int, k: int, seed: int = 3) -> Tensor:
    """Retrieved tokens, long [B, h · w, K]: none at the causal border, fewer than K at two others."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, CODES, (images, height, width, k))
    found[:, 0] = found[:, :, 0] = found[:, :, -1] = MISSING
    found[0, 1, 1, 1:] = MISSING
    found[-1, 2, 1, 2:] = MISSING
    return torch.from_numpy(found.reshape(images, height * width, k))


def loop_features(
    model: Any, faid: Faid, inputs: Tensor, retrieved: Tensor, grid: tuple[int, int], start: int
) -> Tensor:
    """The language model's last hidden states [R, S, D] with FAiD, position by position.

    inputs: embeddings [R, S, D], rows beyond the pictures in `retrieved` [B, P, K] get nothing.
    """
    language = model.model.language_model
    length = inputs.shape[1]
    mask = inputs.new_full((length, length), torch.finfo(inputs.dtype).min).triu(1)[None, None]
    angles = language.rotary_emb(inputs, torch.arange(length)[None])
    hidden = inputs
    chain: dict[tuple[int, int], list[Tensor]] = {}
    for number, layer in enumerate(language.layers):
        normed = layer.input_layernorm(hidden)
        attended, _ = layer.self_attn(
            hidden_states=normed, position_embeddings=angles, attention_mask=mask
        )
        hidden = hidden + attended
        if number in faid.spec.layers:
            hidden = hidden.clone()
            for image in range(len(retrieved)):
                for position in range(grid[0] * grid[1]):
                    at, added = (image, position), hidden.new_zeros(hidden.shape[-1])
                    real = [t for t in retrieved[at].tolist() if t != MISSING] or [MISSING]
                    entering = chain.get(at) or [_embedding(model, token) for token in real]
                    leaving = []
                    for vector in entering:
                        vector = torch.zeros_like(vector) if real == [MISSING] else vector
                        blended = _blend(faid, number, normed[image, start:], at[1], vector, grid)
                        leaving.append(blended)
                        added = added + blended / len(entering)
                    chain[at] = leaving
                    hidden[image, start + position - 1] += added
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    last: Tensor = language.norm(hidden)
    return last


def _embedding(model: Any, token: int) -> Tensor:
    if token == MISSING:
        weight: Tensor = model.model.generation_embeddings.weight
        return weight.new_zeros(WIDTH)
    aligned: Tensor = model.prepare_embeddings_for_image_generation(torch.tensor([token]))
    return aligned[0]


def _blend(
    faid: Faid, number: int, features: Tensor, position: int, vector: Tensor, grid: tuple[int, int]
) -> Tensor:
    """One candidate at one position: score times blended vector, cell by cell."""
    layer: Any = faid.layers[str(number)]
    norm = layer.retrieval_layernorm
    vector = norm.weight * vector * torch.rsqrt((vector**2).mean() + norm.eps)
    row, col = divmod(position, grid[1])
    blender, blended = layer.blender, []
    for hop in blender.hops:
        first, second = getattr(blender, f"conv{hop}"), getattr(blender, f"conv{hop}2")

        def cell(r: int, c: int) -> Tensor:
            if (r, c) == (row, col):
                return vector
            inside = r >= 0 and 0 <= c < grid[1]
            if not inside or r * grid[1] + c >= position:
                return torch.zeros_like(vector)
            return features[r * grid[1] + c]

        pooled = second.bias.clone()
        for a in range(hop + 1):
            for b in range(hop + 1):
                # The window whose upper left corner lies a rows and b columns into the large one.
                seen = first.bias.clone()
                for c in range(hop + 1):
                    for d in range(hop + 1):
                        here = cell(row - hop + a + c, col - hop + b + d)
                        seen = seen + first.weight[:, :, c, d] @ here
                pooled = pooled + second.weight[:, :, a, b] @ seen
        blended.append(pooled)
    if len(blended) == 1 or blender.mix == "mean":
        mixed = torch.stack(blended).mean(0)
    else:
        mixed = (torch.softmax(blender.conv_weights, 0)[:, None] * torch.stack(blended)).sum(0)
    return torch.sigmoid(blender.mlp(mixed)) * mixed
