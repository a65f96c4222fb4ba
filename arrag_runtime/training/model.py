"""A generator in training: FAiD attached, LoRA injected, everything else frozen.

In: prompts, token grids, and what was retrieved for every position. Out: the negative log
likelihood of each token, teacher-forced. Trained are the augmented layers (blenders and norms),
LoRA on the language model's q_proj and v_proj, and the generation head (AR-RAG, section 4).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arrag_runtime.backends.janus import JanusBackend
from arrag_runtime.faid.adapter import LORA, Adapter, AdapterSpec, require_fits
from arrag_runtime.faid.attach import Faid
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.training_set import Examples

_TARGETS = r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
_HEAD = "model.generation_head"
NOT_INSTALLED = (
    "training needs peft and accelerate, which are not installed; `pip install 'arrag[train]'`"
)
_INJECTED = r"(.*)\.lora_([AB])\.default\.weight"


class TrainingModel(nn.Module):
    """The generator with what is trained on it; its own weights stay as they are.

    Trained weights are float32, whatever the precision of the generator. k: candidates per
    position; dropout: LoRA's; longest: how many tokens of a caption are read.
    """

    def __init__(
        self, backend: JanusBackend, spec: AdapterSpec, *, k: int, dropout: float, longest: int
    ) -> None:
        super().__init__()
        self._backend, self._longest = backend, longest
        self.model = backend.model.requires_grad_(False)
        self.spec = spec.checked()
        if spec.lora_rank:
            _inject_lora(self.model, spec, dropout)
        self.faid = Faid(self.model, self.spec, k=k).to(backend.device)
        self.model.get_submodule(_HEAD).float().requires_grad_(True)

    def forward(self, ids: Tensor, mask: Tensor, tokens: Tensor, retrieved: Tensor) -> Tensor:
        """The negative log likelihood of every token in nats, float32 [B, P].

        ids, mask: long [B, T], prompts padded on the left; tokens: long [B, P]; retrieved: long
        [B, P, K], `MISSING` for none.
        """
        with self.faid.whole(retrieved, *self._backend.grid, start=ids.shape[1]):
            logits = teacher_forced(self._backend, ids, mask, tokens)
        return cross_entropy(logits.transpose(1, 2), tokens, reduction="none")

    def inputs(self, examples: Examples) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Examples as `forward` takes them, on the generator's device."""
        ids, mask = self._backend.prompt_ids(examples.captions, longest=self._longest)
        device = self._backend.device
        tokens = torch.from_numpy(examples.tokens.astype(np.int64))
        retrieved = torch.from_numpy(examples.neighbors.astype(np.int64))
        return ids.to(device), mask.to(device), tokens.to(device), retrieved.to(device)

    def adapter(self, about: Mapping[str, str], dtype: torch.dtype | None = None) -> Adapter:
        """A copy of what is trained, as an adapter; dtype None keeps float32."""
        tensors = {
            name: parameter.detach().to("cpu", dtype or parameter.dtype, copy=True)
            for name, parameter in self.trained().items()
        }
        return Adapter(self.spec, tensors, self._backend.codebook(), about)

    def load(self, adapter: Adapter, name: str) -> None:
        """Put an adapter's weights in place. Raises for an adapter of another shape or model."""
        require_fits(adapter, self.model, name)
        ours = self.trained()
        if adapter.spec != self.spec or adapter.tensors.keys() != ours.keys():
            raise BadInputError(
                f"adapter '{name}' has another shape than this training's; start anew with another"
                " --out"
            )
        with torch.no_grad():
            for key, parameter in ours.items():
                parameter.copy_(adapter.tensors[key])

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by the names of an adapter's tensors."""
        ours = {f"faid.{name}": part for name, part in self.faid.named_parameters()}
        for name, parameter in self.model.named_parameters():
            if injected := re.fullmatch(_INJECTED, name):
                ours[f"{LORA}{injected[1]}.{injected[2]}"] = parameter
        head = self.model.get_submodule(_HEAD).named_parameters()
        return ours | {f"{_HEAD}.{name}": part for name, part in head}


def teacher_forced(backend: JanusBackend, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """The logits [B, P, V], float32, of each image token given the prompt and those before it.

    ids, mask: long [B, T], see `JanusBackend.prompt_ids`; tokens: long [B, P]. Trained float32
    parts of a bfloat16 generator compute in bfloat16 too.
    """
    model = backend.model
    half = next(model.model.language_model.parameters()).dtype == torch.bfloat16
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
        prompts = model.get_input_embeddings()(ids)
        images = model.prepare_embeddings_for_image_generation(tokens[:, :-1])
        seen = nn.functional.pad(mask, (0, images.shape[1]), value=1)
        states = model.model.language_model(
            inputs_embeds=torch.cat([prompts, images], 1),
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = model.model.generation_head(states[:, ids.shape[1] - 1 :])
    return logits.float()


def _inject_lora(model: Any, spec: AdapterSpec, dropout: float) -> None:
    """Put LoRA beside the language model's q_proj and v_proj, in float32."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ArragError(NOT_INSTALLED) from error
    config = LoraConfig(
        r=spec.lora_rank, lora_alpha=spec.lora_alpha, lora_dropout=dropout, target_modules=_TARGETS
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
