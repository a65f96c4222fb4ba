"""Checkpoints of Janus-Pro: a configuration, a text tokenizer, and tensors in transformers' names.

In: "sample", a folder, or a hub id. A folder is in transformers' layout (`model_type` janus) or in
deepseek-ai's original one (`model_type` multi_modality), whose names the module `deepseek` maps.
The bundled generator `sample` shares the weights of the bundled tokenizer of pictures, which are
therefore not stored twice.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arrag_runtime.backends.deepseek import original_config, to_transformers_names
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.tokenizers.sample import SAMPLE_TOKENIZER
from arrag_runtime.weight_files import Tensors, fetch, is_hub_id, read_tensors, weight_files

SAMPLE_GENERATOR = Path(__file__).parent / "weights" / "sample"
GUIDANCE = 5.0
"""The weight of guidance that Janus-Pro generates with."""
_PAD = "<｜▁pad▁｜>"
_ACCEPTED = (
    "a folder with config.json, tokenizer.json and weights, or a hub id such as"
    " deepseek-community/Janus-Pro-1B"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model before it is built, by the name that the user gave it.

    guidance and temperature are what its `generation_config.json` asks for, else Janus-Pro's own.
    """

    name: str
    config: Any
    """transformers' JanusConfig."""
    tokenizer: Any
    """The tokenizer of text."""
    state: Callable[[], Tensors]
    """Reads its tensors, under transformers' names."""
    guidance: float = GUIDANCE
    temperature: float = 1.0

    @property
    def parameters(self) -> int:
        """The number of parameters, counted without making any."""
        from transformers import JanusForConditionalGeneration

        with torch.device("meta"):
            model = JanusForConditionalGeneration(self.config)
        return sum(parameter.numel() for parameter in model.parameters())


def read_checkpoint(reference: str) -> Checkpoint:
    """The checkpoint that a user names. Raises BadInputError where it is none or out of reach."""
    folder = SAMPLE_GENERATOR if reference == "sample" else _folder(reference)
    path = folder / "config.json"
    if not path.exists():
        raise BadInputError(
            f"'{reference}' has no config.json, so it is no Janus checkpoint; name {_ACCEPTED}"
        )
    try:
        fields = json.loads(path.read_text())
        kind = fields.get("model_type")
        if kind not in ("janus", "multi_modality"):
            raise BadInputError(
                f"'{reference}' is a model of type '{kind}'; the generator janus takes 'janus'"
                " (transformers' layout) or 'multi_modality' (deepseek-ai's)"
            )
        tokenizer = _tokenizer(folder)
        if kind == "multi_modality":
            state = to_transformers_names(_state(folder))
            config = original_config(fields, state, tokenizer)
            return Checkpoint(reference, config, tokenizer, lambda: state)
        from transformers import JanusConfig

        config = JanusConfig.from_pretrained(folder)
        path = folder / "generation_config.json"
        asked = json.loads(path.read_text()) if path.exists() else {}
        guidance = float(asked.get("guidance_scale") or GUIDANCE)
        temperature = float(asked.get("temperature") or 1.0)
    except ArragError:
        raise
    # What is wrong with a folder shows as nearly any exception of the libraries that read it.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise BadInputError(
            f"'{reference}' cannot be read as a Janus checkpoint: {type(error).__name__}: {reason}"
        ) from error
    return Checkpoint(reference, config, tokenizer, lambda: _state(folder), guidance, temperature)


def _state(folder: Path) -> Tensors:
    state = read_tensors(weight_files(folder))
    if folder == SAMPLE_GENERATOR:
        shared = read_tensors([SAMPLE_TOKENIZER])
        state |= {f"model.vqmodel.{name}": tensor for name, tensor in shared.items()}
    return state


def _tokenizer(folder: Path) -> Any:
    """The text tokenizer of a folder. Raises BadInputError without the marks that Janus needs."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise BadInputError(f"'{folder}' has no tokenizer.json; fetch the whole checkpoint")
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.pad_token_id is None and _PAD in tokenizer.get_vocab():
        tokenizer.pad_token = _PAD
    for name, token in (
        ("beginning of text", tokenizer.bos_token_id),
        ("padding", tokenizer.pad_token_id),
        ("<begin_of_image>", tokenizer.get_vocab().get("<begin_of_image>")),
    ):
        if token is None:
            raise BadInputError(f"the text tokenizer in '{folder}' has no token for {name}")
    return tokenizer


def _folder(reference: str) -> Path:
    """The folder that a reference names, fetched from the hub where it is an id."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(reference):
        raise BadInputError(f"no model at '{reference}'; use 'sample', {_ACCEPTED}")
    return fetch(reference, instead="--model a folder")[0]
