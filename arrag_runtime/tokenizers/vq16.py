"""VQ-16, the tokenizer of LlamaGen and Janus-Pro.

In: prepared pictures uint8 [B, 384, 384, 3]. Out: token grids uint16 [B, 24, 24] and, on request,
the L2-normalised latents they were taken from. Ids are those of LlamaGen: the nearest code by
cosine, argmin ‖normalise(latent) − normalise(codebook)‖ (LlamaGen, arXiv 2406.06525, section 2.1).
transformers' quantiser leaves both unnormalised and finds other ids.

Weights come from LlamaGen's `vq_ds16_t2i.pt`, a safetensors file in either naming, or a Janus-Pro
checkpoint (folder or hub id, deepseek-ai's layout or transformers'). The network's widths are read
off the weights, so narrow models load the same way.
"""

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arrag_runtime.device import require_device, require_precision, torch_dtype
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.ids import require_grid_fits
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.specs import Floats, TokenizerSpec, normalised
from arrag_runtime.tokenizers import Encoded, Pixels, Tokens
from arrag_runtime.tokenizers.preparation import PREPARATION
from arrag_runtime.tokenizers.vq_model import VQModel
from arrag_runtime.weight_files import Tensors, fetch, is_hub_id, read_tensors, weight_files

_HUB_REPO, _HUB_FILE = "peizesun/llamagen_t2i", "vq_ds16_t2i.pt"
"""LlamaGen's own; the commit really fetched is recorded in the database's manifest."""
_GRID = 24
_PREFIXES = ("model.vqmodel.", "vqmodel.", "gen_vision_model.", "")
"""Where a checkpoint keeps the tokenizer: transformers 5 and 4, deepseek-ai, a file of its own."""
CODEBOOK_USED = "quantize.codebook_used"
"""LlamaGen's counter of used codes in training, which is not a weight."""
_NAMES = (
    (r"^(encoder|decoder)\.conv_blocks\.(\d+)\.res\.", r"\1.conv_blocks.\2.block."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^decoder\.conv_blocks\.", "decoder.up."),
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
)


class VQTokenizer:
    """A VQ network used as LlamaGen uses its VQModel; follows the protocol `Tokenizer`."""

    def __init__(
        self, name: str, state: Mapping[str, torch.Tensor], weights: str | None, sha: str
    ) -> None:
        # The exact model stays in float32, so that no precision leaves its rounding behind.
        self._exact: Any = VQModel.load(state)
        self._model: Any = self._exact
        self._encoder: Any = self._exact.encoder
        self._codes = normalised(self._exact.codebook.numpy())
        self._layout = torch.contiguous_format
        self._search = torch.from_numpy(self._codes)
        self.weights, self.precision = weights, "float32"
        stride = 2 ** (len(self._exact.shape.widths) - 1)
        self.spec = TokenizerSpec(
            name=name,
            image_size=_GRID * stride,
            grid_height=_GRID,
            grid_width=_GRID,
            vocabulary=self._codes.shape[0],
            dimension=self._codes.shape[1],
            preparation=PREPARATION.format(size=_GRID * stride),
            weights_sha256=sha,
        )
        require_grid_fits(self.spec)
        if self.spec.vocabulary > MISSING:
            raise BadInputError(
                f"{name} has {self.spec.vocabulary} codes; token columns hold at most {MISSING}"
            )

    def setup(self, device: str, *, precision: str | None = None, compile: bool = False) -> None:
        """Place the model. Default precision: float32 on a CPU, bfloat16 on a GPU.

        On a GPU, and in bfloat16, the convolutions run in channels_last. Raises BadInputError for
        a device that is not there or an unknown precision.
        """
        chosen = require_precision(device, precision)
        require_device(device, "--gpus 0")
        self.precision = chosen
        # bfloat16 in channels_last is several times as fast on a CPU, too (docs/log.md).
        on_gpu = torch.device(device).type == "cuda"
        last = on_gpu or chosen == "bfloat16"
        self._layout = torch.channels_last if last else torch.contiguous_format
        if on_gpu:
            # Convolutions in TF32 would make "float32" something else than float32.
            torch.backends.cudnn.allow_tf32 = False
        self._exact = self._exact.to(device, memory_format=self._layout)
        self._model = self._exact
        if chosen != "float32":
            self._model = copy.deepcopy(self._exact).to(torch_dtype(chosen))
        self._search = torch.from_numpy(self._codes).to(device)
        self._encoder = torch.compile(self._model.encoder) if compile else self._model.encoder

    @torch.inference_mode()
    def encode(self, images: Pixels, *, latents: bool = False) -> Encoded:
        """See `Tokenizer.encode`. The nearest code is searched in float32 at any precision."""
        z = self._latents(self._model, self._encoder, images)
        tokens = self._nearest(z).cpu().numpy().astype(np.uint16)
        return Encoded(tokens, z.to(torch.float16).cpu().numpy() if latents else None)

    @torch.inference_mode()
    def agreement(self, images: Pixels) -> float:
        """See `Tokenizer.agreement`; 1.0 when the model already runs in float32."""
        if self._model is self._exact:
            return 1.0
        ours = self._nearest(self._latents(self._model, self._encoder, images))
        exact = self._nearest(self._latents(self._exact, self._exact.encoder, images))
        return float((ours == exact).float().mean())

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Pixels:
        """See `Tokenizer.decode`: normalised codes through LlamaGen's decoder, in float32."""
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._search.device)
        codes = self._search[ids].permute(0, 3, 1, 2)
        pixels = self._exact.decoder(self._exact.post_quant_conv(codes))
        shown = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        pictures: Pixels = shown.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return pictures

    def codebook(self) -> Floats:
        """See `Tokenizer.codebook`."""
        return self._codes

    def _latents(self, model: Any, encoder: Any, images: Pixels) -> torch.Tensor:
        """L2-normalised encoder outputs, float32 [B, h, w, d]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._search.device)
        pixels = pixels.permute(0, 3, 1, 2).to(model.quant_conv.weight.dtype) / 127.5 - 1
        pixels = pixels.contiguous(memory_format=self._layout)
        z = model.quant_conv(encoder(pixels))
        return torch.nn.functional.normalize(z.float().permute(0, 2, 3, 1), dim=-1)

    def _nearest(self, z: torch.Tensor) -> torch.Tensor:
        """The ids of the nearest codes; among unit vectors that is the largest cosine."""
        return (z @ self._search.T).argmax(dim=-1)


def load_vq16(weights: str | None) -> VQTokenizer:
    """VQ-16 from a file, a folder, a hub id (`owner/name[@revision]`), or the hub's default.

    Raises BadInputError when the weights cannot be reached or are not a VQ tokenizer's.
    """
    reference = weights or _HUB_REPO
    if weights and Path(weights).exists():
        path, origin = Path(weights), str(Path(weights).resolve())
    elif is_hub_id(reference):
        file = _HUB_FILE if reference.partition("@")[0] == _HUB_REPO else None
        path, origin = fetch(reference, file=file, instead="--tokenizer-weights PATH")
    else:
        raise BadInputError(
            f"no tokenizer weights at '{weights}'; give vq_ds16_t2i.pt, a safetensors file,"
            " a Janus-Pro folder, or a hub id such as deepseek-community/Janus-Pro-1B"
        )
    return load_vq("vq16", path, origin)


def load_vq(name: str, path: Path, origin: str | None) -> VQTokenizer:
    """A VQ tokenizer from a local file or checkpoint folder; `origin` is what loads it again."""
    try:
        files = weight_files(path, _PREFIXES[:-1])
        state = _read_tokenizer(files)
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return VQTokenizer(name, state, origin, digest.hexdigest())
    except ArragError:
        raise
    # What is wrong with a file of weights shows as nearly any exception of its reader or of torch.
    except Exception as error:
        raise BadInputError(
            f"'{path}' holds no VQ tokenizer of LlamaGen's or Janus-Pro's shape:"
            f" {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def transformers_name(name: str) -> str:
    """LlamaGen's name of a weight as JanusVQVAE's; one that is JanusVQVAE's already stays."""
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _read_tokenizer(files: list[Path]) -> Tensors:
    """The tokenizer's tensors in JanusVQVAE's names; other parts of a checkpoint stay on disk."""
    for prefix in _PREFIXES:
        state = read_tensors(files, prefix)
        if "quantize.embedding.weight" in state:
            state.pop(CODEBOOK_USED, None)
            return {transformers_name(name): tensor for name, tensor in state.items()}
    raise BadInputError(
        f"'{files[0]}' holds no tensor 'quantize.embedding.weight'; expected a VQ tokenizer's or"
        " a Janus-Pro checkpoint's weights"
    )
