"""VQ-16, the tokenizer of LlamaGen and Janus-Pro, on transformers' JanusVQVAE.

In: prepared pictures uint8 [B, 384, 384, 3]. Out: token grids uint16 [B, 24, 24] and, on request,
the L2-normalised latents they were taken from. Ids are those of LlamaGen: the nearest code by
cosine, argmin ‖normalise(latent) − normalise(codebook)‖ (LlamaGen, arXiv 2406.06525, section 2.1).
transformers' own quantiser leaves both unnormalised and finds other ids, so only its encoder,
codebook and decoder are used here.

Weights come from LlamaGen's `vq_ds16_t2i.pt`, a safetensors file in either naming, or a Janus-Pro
checkpoint (folder or hub id, deepseek-ai's layout or transformers'). The architecture's widths are
read off the weights, so narrow models load the same way.
"""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch

from arrag_runtime.device import require_device
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.ids import require_grid_fits
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.specs import Floats, TokenizerSpec, normalised
from arrag_runtime.tokenizers import Encoded, Pixels, Tokens
from arrag_runtime.tokenizers.preparation import PREPARATION

HUB_REPO = "peizesun/llamagen_t2i"
HUB_FILE = "vq_ds16_t2i.pt"
HUB_REVISION = "main"
"""Replace by a commit to pin; the commit really fetched is recorded in the database's manifest."""

GRID = 24
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFIXES = ("model.vqmodel.", "vqmodel.", "gen_vision_model.", "")
"""Where a checkpoint keeps the tokenizer: transformers 5 and 4, deepseek-ai, a file of its own."""


class VQTokenizer:
    """A JanusVQVAE used as LlamaGen uses its VQModel; follows the protocol `Tokenizer`."""

    def __init__(
        self, name: str, state: Mapping[str, torch.Tensor], weights: str | None, sha: str
    ) -> None:
        # The exact model stays in float32, so that no precision leaves its rounding behind.
        self._exact: Any = _build(state)
        self._model: Any = self._exact
        self._encoder: Any = self._exact.encoder
        self._codes = normalised(self._exact.quantize.embedding.weight.detach().float().numpy())
        self._device = torch.device("cpu")
        self._layout = torch.contiguous_format
        self._search = torch.from_numpy(self._codes)
        self.precision = "float32"
        self.weights = weights
        stride = 2 ** (len(self._exact.config.channel_multiplier) - 1)
        self.spec = TokenizerSpec(
            name=name,
            image_size=GRID * stride,
            grid_height=GRID,
            grid_width=GRID,
            vocabulary=self._codes.shape[0],
            dimension=self._codes.shape[1],
            preparation=PREPARATION.format(size=GRID * stride),
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
        chosen = precision or ("float32" if device == "cpu" else "bfloat16")
        if chosen not in PRECISIONS:
            raise BadInputError(
                f"unknown precision '{chosen}'; choose one of {', '.join(PRECISIONS)}"
            )
        require_device(device, "--gpus 0")
        self._device = torch.device(device)
        self.precision = chosen
        # bfloat16 in channels_last is several times as fast on a CPU, too (docs/log.md).
        last = self._device.type == "cuda" or chosen == "bfloat16"
        layout = torch.channels_last if last else torch.contiguous_format
        if self._device.type == "cuda":
            # Convolutions in TF32 would make "float32" something else than float32.
            torch.backends.cudnn.allow_tf32 = False
        self._layout = layout
        self._exact = self._exact.to(self._device, memory_format=layout)
        self._model = self._exact
        if chosen != "float32":
            self._model = copy.deepcopy(self._exact).to(PRECISIONS[chosen])
        self._search = torch.from_numpy(self._codes).to(self._device)
        self._encoder = torch.compile(self._model.encoder) if compile else self._model.encoder

    @torch.inference_mode()
    def encode(self, images: Pixels, *, latents: bool = False) -> Encoded:
        """See `Tokenizer.encode`. The nearest code is searched in float32 at any precision."""
        z = self._latents(self._model, self._encoder, images)
        tokens = self._nearest(z)
        return Encoded(
            tokens.cpu().numpy().astype(np.uint16),
            z.to(torch.float16).cpu().numpy() if latents else None,
        )

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
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
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
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
        pixels = pixels.permute(0, 3, 1, 2).to(model.quant_conv.weight.dtype) / 127.5 - 1
        pixels = pixels.contiguous(memory_format=self._layout)
        z = model.quant_conv(encoder(pixels))
        return torch.nn.functional.normalize(z.float().permute(0, 2, 3, 1), dim=-1)

    def _nearest(self, z: torch.Tensor) -> torch.Tensor:
        """The ids of the nearest codes; among unit vectors that is the largest cosine."""
        return (z @ self._search.T).argmax(dim=-1)


def _build(state: Mapping[str, torch.Tensor]) -> Any:
    """A JanusVQVAE with these weights, its widths read off them; every name must match."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    def widths(part: str) -> list[int]:
        found = {
            int(m[1]): tensor.shape[0]
            for name, tensor in state.items()
            if (m := re.fullmatch(rf"{part}\.(\d+)\.block\.0\.conv1\.weight", name))
        }
        return [found[level] for level in sorted(found)]

    blocks = [m[1] for n in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", n))]
    base = state["encoder.conv_in.weight"].shape[0]
    config = JanusVQVAEConfig(
        embed_dim=state["quantize.embedding.weight"].shape[1],
        num_embeddings=state["quantize.embedding.weight"].shape[0],
        latent_channels=state["quant_conv.weight"].shape[1],
        base_channels=base,
        channel_multiplier=[width // base for width in widths(r"encoder\.down")],
        num_res_blocks=len(set(blocks)),
        num_patches=GRID,
    )
    model = JanusVQVAE(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model.eval().requires_grad_(False)


def load_vq16(weights: str | None) -> VQTokenizer:
    """VQ-16 from a file, a folder, a hub id (`owner/name[@revision]`), or the hub's default.

    Raises BadInputError when the weights cannot be reached or are not a VQ tokenizer's.
    """
    reference = weights or f"{HUB_REPO}@{HUB_REVISION}"
    if weights and Path(weights).exists():
        path, origin = Path(weights), str(Path(weights).resolve())
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", reference):
        repo, _, revision = reference.partition("@")
        path, origin = _from_hub(repo, revision or "main", HUB_FILE if repo == HUB_REPO else None)
    else:
        raise BadInputError(
            f"no tokenizer weights at '{weights}'; give vq_ds16_t2i.pt, a safetensors file,"
            " a Janus-Pro folder, or a hub id such as deepseek-community/Janus-Pro-1B"
        )
    return load_vq("vq16", path, origin)


def load_vq(name: str, path: Path, origin: str | None) -> VQTokenizer:
    """A VQ tokenizer from a local file or checkpoint folder; `origin` is what loads it again."""
    try:
        files = _weight_files(path)
        state = to_transformers_names(_read_tokenizer(files))
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


def to_transformers_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LlamaGen's names as JanusVQVAE's; names that are JanusVQVAE's already stay."""
    renamed = {}
    for name, tensor in state.items():
        if name == "quantize.codebook_used":
            continue
        name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block.", name)
        name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
        name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block.", name)
        name = re.sub(r"^decoder\.conv_blocks\.", "decoder.up.", name)
        for index, part in enumerate(("block_1", "attn_1", "block_2")):
            name = re.sub(rf"^(encoder|decoder)\.mid\.{index}\.", rf"\1.mid.{part}.", name)
        renamed[name] = tensor
    return renamed


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights at `path`: itself, or a checkpoint folder's own."""
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        held = {f for name, f in weight_map.items() if name.startswith(PREFIXES[:-1])}
        return sorted(path / file for file in held or set(weight_map.values()))
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        if files := sorted(path.glob(pattern)):
            return files
    raise BadInputError(f"folder '{path}' has no .safetensors, .bin or .pt file")


def _read_tokenizer(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tokenizer's tensors, without its prefix; other parts of a checkpoint stay on disk."""
    from safetensors import safe_open

    for prefix in PREFIXES:
        state: dict[str, torch.Tensor] = {}
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(str(file), framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                        if name.startswith(prefix):
                            state[name.removeprefix(prefix)] = tensors.get_tensor(name)
            else:
                for name, tensor in _read_pickle(file).items():
                    if name.startswith(prefix):
                        state[name.removeprefix(prefix)] = tensor
        if "quantize.embedding.weight" in state:
            return state
    raise BadInputError(
        f"'{files[0]}' holds no tensor 'quantize.embedding.weight'; expected a VQ tokenizer's or"
        " a Janus-Pro checkpoint's weights"
    )


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """A .pt or .bin state dict, read without running code from it."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:
        raise BadInputError(
            f"'{file}' is not a weights file that can be read safely: {str(error).splitlines()[0]}"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise BadInputError(f"'{file}' holds a {type(loaded).__name__}, not a model's weights")
    return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}


def _from_hub(repo: str, revision: str, file: str | None) -> tuple[Path, str]:
    """Fetch from the hub; returns the local path and "repo@commit" as really fetched."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            path = Path(hf_hub_download(repo, file, revision=revision))
            commit = path.parent.name
        else:
            patterns = ["*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"]
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
            commit = path.name
    except Exception as error:
        raise BadInputError(
            f"cannot fetch {repo}@{revision} from the hub ({type(error).__name__}); check the"
            " network and your token (`hf auth login`), or give --tokenizer-weights PATH"
        ) from error
    return path, f"{repo}@{commit}"
