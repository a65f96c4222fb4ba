"""Janus-Pro on transformers' `JanusForConditionalGeneration`.

In: prompts, then one image token per step. Out: logits over the next image token, and pictures
of finished grids. The template, the blank prompts of guidance and the memory of keys and values are
those of transformers' own `generate` in image mode, so greedy tokens are the same; only the loop is
ours, since nothing can be mixed into `generate` after guidance.

Source: Janus-Pro (arXiv 2501.17811), section 2; guidance as in its released generation script.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arrag_runtime.backends.checkpoint import GUIDANCE, Checkpoint, read_checkpoint
from arrag_runtime.device import (
    out_of_memory,
    require_device,
    require_memory,
    require_precision,
    torch_dtype,
)
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.specs import Floats, normalised
from arrag_runtime.tokenizers import Pixels

_BEGIN_OF_IMAGE = "<begin_of_image>"
TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:" + _BEGIN_OF_IMAGE


class JanusBackend:
    """A Janus model that generates pictures; follows the protocol `Backend`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        guidance: float = GUIDANCE,
        temperature: float = 1.0,
    ) -> None:
        self.name = name
        self.guidance, self.temperature = guidance, temperature
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._pad = int(tokenizer.pad_token_id)
        self._begin = int(tokenizer.convert_tokens_to_ids(_BEGIN_OF_IMAGE))
        side = int(model.config.vq_config.num_patches)
        self.grid = (side, side)
        weight = model.model.vqmodel.quantize.embedding.weight
        self._codes = normalised(weight.detach().float().cpu().numpy())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def codebook(self) -> Floats:
        """See `Backend.codebook`."""
        return self._codes

    def start(self, prompts: Sequence[str], *, guided: bool) -> "JanusDecoding":
        """See `Backend.start`."""
        ids, mask = self.prompt_ids(prompts)
        longest = int(self.model.config.text_config.max_position_embeddings)
        steps = self.grid[0] * self.grid[1]
        if ids.shape[1] + steps > longest:
            raise BadInputError(
                f"a prompt has {ids.shape[1]} tokens; {self.name} has room for {longest - steps}"
                f" beside {steps} image tokens, so shorten it"
            )
        if guided:
            # Guidance compares with the same prompt blanked out, all but its beginning and end.
            kept = (ids == self.tokenizer.bos_token_id) | (ids == self._begin)
            ids = torch.cat([ids, torch.where(kept, ids, self._pad)])
            mask = mask.repeat(2, 1)
        return JanusDecoding(self.model, ids.to(self.device), mask.to(self.device), steps)

    @torch.inference_mode()
    def pixels(self, tokens: npt.NDArray[np.uint16]) -> Pixels:
        """See `Backend.pixels`: normalised codes through the tokenizer's decoder, one by one."""
        grids = torch.from_numpy(tokens.astype(np.int64)).flatten(1).to(self.device)
        shown = []
        for grid in grids:
            decoded = self.model.decode_image_tokens(grid[None])[0].float()
            shown.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        pictures: Pixels = torch.stack(shown).numpy()
        return pictures

    def prompt_ids(
        self, prompts: Sequence[str], *, longest: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts in the template as (ids, mask) long [B, T], padded on the left.

        longest: how many tokens of each prompt itself are kept; None keeps all.
        """
        shown = [self._cut(prompt.strip(), longest) for prompt in prompts]
        rows = [self._ids(TEMPLATE.format(prompt=prompt)) for prompt in shown]
        width = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def _cut(self, prompt: str, longest: int | None) -> str:
        """The prompt, or what its first `longest` tokens say."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if longest is None or len(ids) <= longest:
            return prompt
        return str(self.tokenizer.decode(ids[:longest]))

    def _ids(self, text: str) -> list[int]:
        """A text's ids, its beginning marked whatever the tokenizer's file says of that."""
        begin = int(self.tokenizer.bos_token_id)
        ids: list[int] = list(self.tokenizer(text)["input_ids"])
        return ids if ids[0] == begin else [begin, *ids]


class JanusDecoding:
    """A batch of pictures with the model's keys and values; follows the protocol `Decoding`."""

    def __init__(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> None:
        from transformers import StaticCache

        self._model, self._ids = model, ids
        rows, length = ids.shape
        space = length + steps
        self._cache = StaticCache(config=model.config.text_config, max_cache_len=space)
        self._at = torch.full((1, 1), length, device=ids.device)
        # What may be seen: 0 for the prompt's own tokens and those read so far, else "never".
        self._never = torch.finfo(model.dtype).min
        shape = (rows, 1, 1, space)
        self._seen = torch.full(shape, self._never, dtype=model.dtype, device=ids.device)
        self._seen[:, 0, 0, :length].masked_fill_(mask.bool(), 0)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor | None) -> torch.Tensor:
        """See `Decoding.forward`. The logits are of the model's own precision."""
        return self._read_prompts() if tokens is None else self._read_tokens(tokens)

    def _read_prompts(self) -> torch.Tensor:
        length, space = self._ids.shape[1], self._seen.shape[-1]
        at = torch.arange(length, device=self._ids.device)
        later = torch.arange(space, device=self._ids.device)[None] > at[:, None]
        mask = self._seen.masked_fill(later[None, None], self._never)
        return self._logits(self._model.get_input_embeddings()(self._ids), at[None], mask)

    def _read_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """One step; it reads and changes tensors in place only, so a CUDA graph can hold it."""
        both = tokens.repeat(len(self._ids) // len(tokens))[:, None]
        self._seen.index_fill_(3, self._at[0], 0)
        embedded = self._model.prepare_embeddings_for_image_generation(both)
        logits = self._logits(embedded, self._at, self._seen)
        self._at.add_(1)
        return logits

    def _logits(self, embedded: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self._model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=at,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        logits: torch.Tensor = self._model.model.generation_head(states[:, -1])
        return logits


def load_janus(reference: str, device: str = "cpu", precision: str | None = None) -> JanusBackend:
    """A Janus model from "sample", a folder or the hub, placed on "cpu" or "cuda[:n]".

    Raises BadInputError where it cannot be reached, is no Janus model, or does not fit the memory.
    """
    chosen = require_precision(device, precision)
    require_device(device, "--device cpu")
    read = read_checkpoint(reference)
    dtype = torch_dtype(chosen)
    require_memory(read.parameters * dtype.itemsize, device, f"{reference} in {chosen}")
    with out_of_memory(f"loading {reference} in {chosen} on {device}"):
        model = janus_model(read, dtype).to(device)
    return JanusBackend(
        model, read.tokenizer, reference, guidance=read.guidance, temperature=read.temperature
    )


def janus_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model of a checkpoint; every tensor must match. Raises BadInputError otherwise."""
    from transformers import JanusForConditionalGeneration
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the command has a bar of its own
    try:
        model, report = JanusForConditionalGeneration.from_pretrained(
            None,
            config=checkpoint.config,
            state_dict=checkpoint.state(),
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        raise BadInputError(
            f"'{checkpoint.name}' holds no Janus model that fits its own config.json:"
            f" {str(error).splitlines()[0]}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise BadInputError(
            f"'{checkpoint.name}' does not fit its own config.json: {len(wrong)} tensors are missing,"
            f" unknown or of another shape, first '{wrong[0]}'; fetch it again"
        )
    return model
