"""Adapter weights of FAiD: one safetensors file, or the released full checkpoint.

In: a file or folder. Out: an `Adapter`: its shape, the tensors of the augmented layers
(`faid.layers.L.…`), LoRA pairs (`lora.NAME.A`, `lora.NAME.B`), tensors that replace the model's own
(under the names of transformers' JanusForConditionalGeneration), and the codebook that its tokens
index.

The released checkpoint (`jingyq1/arrag_faid`) is a full Janus state dict in deepseek-ai's names
with LoRA merged into it: its language model, generation head, embeddings and aligner are kept
whole.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arrag_runtime.backends.deepseek import janus_name
from arrag_runtime.faid.patch_blender import Mix, require_hops
from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.specs import SAME_CODE_COSINE, Floats, normalised
from arrag_runtime.weight_files import read_tensors, weight_files

LAYERS, LORA = "faid.layers.", "lora."
_FORMAT, _CODEBOOK = "1", "codebook"
_FROZEN = ("vision_model.", "aligner.", "gen_vision_model.")
"""Parts of the released checkpoint that were frozen in training: a generator has its own."""


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of an adapter and of the language model it was trained for."""

    width: int
    """D, the width of hidden states."""
    depth: int
    """L, the number of decoder layers."""
    vocabulary: int
    """The number of image codes."""
    hops: tuple[int, ...] = (1, 2)
    """The windows that are blended; hop h sees (2h + 1) x (2h + 1) cells."""
    blenders: int = 2
    """The number of augmented layers."""
    mix: Mix = "softmax"
    """How the hops' results are mixed."""
    lora_rank: int = 0
    """LoRA's r, 0 without LoRA."""
    lora_alpha: int = 0
    """LoRA's alpha; an update is scaled by alpha / r."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The augmented layers: every (L / blenders)-th from layer 0."""
        return tuple(index * (self.depth // self.blenders) for index in range(self.blenders))

    def checked(self) -> "AdapterSpec":
        """This spec with sorted hops. Raises BadInputError for hops or blenders that cannot be."""
        if not 1 <= self.blenders <= self.depth:
            raise BadInputError(
                f"{self.blenders} blenders in a model of {self.depth} layers; give 1..{self.depth}"
            )
        return replace(self, hops=require_hops(self.hops))


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory."""

    spec: AdapterSpec
    """Its shape."""
    tensors: Mapping[str, Tensor]
    """Its weights by name, as the file has them."""
    codebook: Floats
    """What its tokens index: float32 [V, d], L2-normalised."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from, in free text."""

    def layer_tensors(self) -> dict[str, Tensor]:
        """The augmented layers' tensors under the names of their module."""
        return {n.removeprefix("faid."): t for n, t in self.tensors.items() if n.startswith(LAYERS)}

    def lora_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA's (A [r, in], B [out, r]) by the module they belong to."""
        names = sorted({name[len(LORA) : -2] for name in self.tensors if name.startswith(LORA)})
        return {n: (self.tensors[f"{LORA}{n}.A"], self.tensors[f"{LORA}{n}.B"]) for n in names}

    def replacements(self) -> dict[str, Tensor]:
        """The tensors that take the place of the model's own, by parameter name."""
        return {n: t for n, t in self.tensors.items() if not n.startswith((LAYERS, LORA))}


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write one safetensors file, so that a reader sees the old one or the whole new one."""
    codes = torch.from_numpy(adapter.codebook.astype(np.float16))
    tensors = {name: t.detach().cpu().contiguous() for name, t in adapter.tensors.items()}
    fields = json.dumps(asdict(adapter.spec), sort_keys=True)
    metadata = {"format": _FORMAT, "adapter": fields, "about": json.dumps(dict(adapter.about))}
    metadata["codebook"] = hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:16]
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {_CODEBOOK: codes}, temporary, metadata=metadata)
    # safetensors makes files that only their owner may read.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(path)


def read_adapter(path: Path | str) -> Adapter:
    """An adapter from its file, or the released checkpoint from a file or folder, on the CPU.

    Raises BadInputError for a path that is not there, is damaged or holds neither.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise BadInputError(
            f"no adapter at '{path}'; give a file that `arrag train` wrote, or the released"
            " checkpoint's folder"
        )
    try:
        metadata: dict[str, str] = {}
        if place.is_file() and place.suffix == ".safetensors":
            with safe_open(place, "pt") as file:
                metadata = file.metadata() or {}
        tensors = read_tensors(weight_files(place))
        own = "adapter" in metadata
        return _own(place, metadata, tensors) if own else _import_released(tensors, str(path))
    except (SafetensorError, EOFError, RuntimeError, ValueError) as error:
        detail = str(error).splitlines()[0]
        raise BadInputError(
            f"adapter '{path}' is damaged or incomplete ({detail}); copy or train it again"
        ) from error


def _own(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Adapter:
    if metadata.get("format") != _FORMAT:
        raise IncompatibleError(
            f"adapter '{path}' is of format {metadata.get('format')}, not {_FORMAT}; use the version"
            " that wrote it"
        )
    fields = json.loads(metadata["adapter"])
    spec = AdapterSpec(**fields | {"hops": tuple(fields["hops"])})
    codes = normalised(tensors.pop(_CODEBOOK).float().numpy())
    return Adapter(spec, tensors, codes, json.loads(metadata["about"]))


def _import_released(tensors: Mapping[str, Tensor], name: str) -> Adapter:
    """The adapter in a full checkpoint with deepseek-ai's names and blenders in its layers.

    Nothing that generation uses is left out: language model, head, embeddings and aligner.
    Raises BadInputError for a checkpoint without blenders, or with names that it does not know.
    """
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(_FROZEN) or key.endswith("rotary_emb.inv_freq"):
            continue
        kept[_renamed(key, name)] = tensor
    blenders = sorted({int(key.split(".")[2]) for key in kept if key.startswith(LAYERS)})
    if not blenders:
        raise BadInputError(
            f"'{name}' holds no blender, so it is no FAiD adapter; give a file that `arrag train`"
            " wrote, or the released checkpoint"
        )
    first = f"{LAYERS}{blenders[0]}.blender."
    hops = tuple(hop for hop in (1, 2, 3) if f"{first}conv{hop}.weight" in kept)
    depths = [re.match(r"model\.language_model\.layers\.(\d+)\.", key) for key in kept]
    spec = AdapterSpec(
        width=int(kept[f"{first}mlp.0.weight"].shape[0]),
        depth=1 + max(int(found[1]) for found in depths if found),
        vocabulary=int(kept["model.generation_embeddings.weight"].shape[0]),
        hops=hops,
        blenders=len(blenders),
        mix="softmax" if len(hops) == 1 or f"{first}conv_weights" in kept else "mean",
    )
    if tuple(blenders) != spec.layers:
        raise IncompatibleError(
            f"'{name}' augments layers {blenders}, but {len(blenders)} blenders in {spec.depth}"
            f" layers stand at {list(spec.layers)}; it was made by other code than the released one"
        )
    codes = tensors.get("gen_vision_model.quantize.embedding.weight")
    if codes is None:
        raise BadInputError(
            f"'{name}' lacks gen_vision_model.quantize.embedding.weight, the codebook of its tokens;"
            " give the full checkpoint"
        )
    return Adapter(spec, kept, normalised(codes.float().numpy()), {"imported from": name})


def _renamed(key: str, checkpoint: str) -> str:
    """A released name as this module's. Raises BadInputError for one that it does not know."""
    pattern = r"language_model\.model\.layers\.(\d+)\.((?:blender|retrieval_layernorm)\..+)"
    if augmented := re.fullmatch(pattern, key):
        return f"{LAYERS}{augmented[1]}.{augmented[2]}"
    ours = janus_name(key)
    if ours == key:
        raise BadInputError(
            f"'{checkpoint}' holds '{key}', which no Janus checkpoint has; give the released one"
        )
    return ours


def require_fits(adapter: Adapter, model: Any, name: str) -> None:
    """Raise IncompatibleError, naming both sides, unless the adapter was made for this model.

    model: a JanusForConditionalGeneration; name: the adapter's, for the message.
    """
    have, want = adapter.spec, spec_of_model(model)
    for what, ours, theirs in (
        ("hidden states of width", have.width, want.width),
        ("decoder layers,", have.depth, want.depth),
        ("image codes,", have.vocabulary, want.vocabulary),
    ):
        if ours != theirs:
            raise IncompatibleError(
                f"adapter '{name}' was made for {what} {ours}, the model has {theirs}; use the model"
                " it was trained on"
            )
    codes = model_codebook(model)
    lowest = float((codes * adapter.codebook).sum(1).min()) if codes.size else 1.0
    if codes.shape != adapter.codebook.shape or lowest < SAME_CODE_COSINE:
        raise IncompatibleError(
            f"adapter '{name}' and the model have different codebooks (lowest cosine of a row"
            f" {lowest:.4f}, needed {SAME_CODE_COSINE}); use the model it was trained on"
        )


def spec_of_model(model: Any) -> AdapterSpec:
    """The width, depth and vocabulary of a JanusForConditionalGeneration, without an adapter."""
    text, codes = model.config.text_config, model.config.vq_config.num_embeddings
    return AdapterSpec(int(text.hidden_size), int(text.num_hidden_layers), int(codes))


def model_codebook(model: Any) -> Floats:
    """The L2-normalised codebook float32 [V, d] of a model's own tokenizer."""
    weight: Tensor = model.model.vqmodel.quantize.embedding.weight
    return normalised(weight.detach().float().cpu().numpy())
