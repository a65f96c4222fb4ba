"""Train the small bundled VQ tokenizer `sample`, and measure it on pictures it never saw.

In: a folder of webdataset tars with .jpg pictures. A tenth of them, chosen by the hash of their
bytes, is held out; training sees the rest. Out: one safetensors file with the weights of a narrow
`JanusVQVAE` in float16, its configuration in the metadata.

    python benchmarks/train_sample_tokenizer.py train --data DATA --minutes 70 --out sample.safetensors
    python benchmarks/train_sample_tokenizer.py evaluate --data DATA --weights sample.safetensors

Two CPU cores cannot train such a network at 384x384 from random weights within an hour, so:

1. The network starts as a linear pyramid. Every residual branch begins at zero, down- and
   upsampling begin as Haar analysis and bilinear interpolation, and the colours pass through.
2. It grows from the inside. While a level is not yet trained its linear start is computed
   directly (means of 2x2 pixels, bilinear interpolation of three channels), which costs nearly
   nothing and is the same function. Levels 2-4 train first, then 1-4. Level 0, at full
   resolution, costs more than all others together, and 12 bits for 16x16 pixels leave it little
   to draw: it keeps its start.
3. The last minutes fit the codebook to the finished encoder, then train the decoder alone.

The loss is the mean over pictures of log(mean squared error), which is PSNR up to a factor.
Phases are given in minutes, so the number of steps depends on the machine; it is logged. Where
other programs want the same cores, set OMP_WAIT_POLICY=passive: it made steps four times faster.
"""

import argparse
import copy
import hashlib
import json
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import JanusVQVAE, JanusVQVAEConfig

from schemas.tables import is_held_out
from stages.encode.decode import DecodeSettings, decode_image

CONFIG: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [2, 1, 2, 2, 4],
    "num_res_blocks": 1,
    "latent_channels": 64,
    "embed_dim": 8,
    "num_embeddings": 4096,
    "num_patches": 24,
}
SIDE = 384
HELD_OUT_SHARE = 0.1
COLOURS = 3
HAAR = 12
"""Channels of one Haar step on RGB: three means, then three each of horizontal, vertical, diagonal."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Phase:
    """A stretch of training. `level`: outermost level that is trained (0 = full resolution).

    `share`: part of the total minutes. `rate`: learning rate at the start and at the end.
    """

    name: str
    share: float
    level: int
    quantized: bool
    decoder_only: bool
    crop: int
    batch: int
    rate: tuple[float, float]


PHASES = (
    Phase("warm-up", 0.04, 2, False, False, 352, 8, (1e-3, 1e-3)),
    Phase("inner", 0.50, 2, True, False, 352, 8, (1e-3, 5e-4)),
    Phase("middle", 0.32, 1, True, False, 352, 8, (5e-4, 5e-5)),
    Phase("decoder", 0.14, 1, True, True, 384, 8, (3e-4, 0.0)),
)


# --- Pictures -------------------------------------------------------------------------------


def read_pictures(folder: Path) -> tuple[Pixels, Pixels]:
    """Every decodable .jpg of the tars, prepared to 384x384: (training, held out)."""
    sides: tuple[list[Pixels], list[Pixels]] = ([], [])
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is None:
                    continue
                data = file.read()
                held_out = is_held_out(hashlib.sha256(data).hexdigest(), HELD_OUT_SHARE)
                sides[held_out].append(decode_image(data, DecodeSettings(size=SIDE)).pixels)
    return np.stack(sides[False]), np.stack(sides[True])


def to_tensor(pixels: Pixels) -> Tensor:
    """uint8 [B, h, w, 3] to float [B, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def training_batch(pictures: Pixels, phase: Phase, random: np.random.Generator) -> Tensor:
    """Random pictures, each randomly mirrored and cropped to the phase's size."""
    crops = []
    for i in random.integers(len(pictures), size=phase.batch):
        top, left = random.integers(SIDE - phase.crop + 1, size=2)
        crop = pictures[i, top : top + phase.crop, left : left + phase.crop]
        crops.append(crop[:, ::-1] if random.random() < 0.5 else crop)
    return to_tensor(np.stack(crops))


# --- The network's start --------------------------------------------------------------------


def new_model(seed: int) -> JanusVQVAE:
    """A model that begins as a linear pyramid: see the top of this file."""
    torch.manual_seed(seed)
    model = JanusVQVAE(JanusVQVAEConfig(**CONFIG))
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.reset_parameters()
    for module in model.modules():
        name = type(module).__name__
        if name == "JanusVQVAEResnetBlock":
            _zero(module.conv2)
            if module.in_channels != module.out_channels:
                _copy_channels(module.nin_shortcut)
        elif name == "JanusVQVAEAttnBlock":
            _zero(module.proj_out)
    with torch.no_grad():
        _start_encoder(model.encoder)
        _start_decoder(model.decoder)
    model.quantize.embedding.weight.requires_grad_(False)
    return model


def _zero(conv: Any) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


def _copy_channels(conv: Any) -> None:
    """Output channel c begins as input channel c; channels beyond the input keep noise."""
    same = min(conv.in_channels, conv.out_channels)
    with torch.no_grad():
        conv.weight[:same] = 0.0
        conv.weight[
            range(same), range(same), conv.kernel_size[0] // 2, conv.kernel_size[1] // 2
        ] = 1.0
        conv.bias.zero_()


def haar_kernel() -> Tensor:
    """[12, 3, 2, 2]: means of 2x2 pixels and twice their horizontal, vertical, diagonal differences."""
    signs = (
        torch.tensor([[[1, 1], [1, 1]], [[-1, 1], [-1, 1]], [[-1, -1], [1, 1]], [[1, -1], [-1, 1]]])
        / 4
    )
    scale = torch.tensor([1.0, 2.0, 2.0, 2.0]).view(4, 1, 1)
    return torch.einsum("kij,cd->kcdij", signs * scale, torch.eye(COLOURS)).reshape(
        HAAR, COLOURS, 2, 2
    )


def _start_encoder(encoder: Any) -> None:
    encoder.conv_in.weight[:COLOURS] = 0.0
    encoder.conv_in.weight[range(COLOURS), range(COLOURS), 1, 1] = 1.0
    encoder.conv_in.bias.zero_()
    last = len(encoder.down) - 1
    for level, stage in enumerate(encoder.down):
        if level < last:
            conv = stage.downsample.conv
            conv.weight[:HAAR] = 0.0
            conv.weight[:HAAR, :COLOURS, :2, :2] = haar_kernel()
            conv.bias.zero_()
            if level < PHASES[0].level:  # what stands in for these levels knows Haar channels only
                conv.weight[HAAR:] = 0.0
    # Groups of the last norm hold four channels: two features and the constants 2 and -2, against
    # which absolute values survive the normalisation.
    shortcut = encoder.down[last].block[0].nin_shortcut
    shortcut.weight.zero_()
    for feature in range(shortcut.in_channels):
        shortcut.weight[4 * (feature // 2) + feature % 2, feature] = 1.0
    shortcut.bias[2::4] = 2.0
    shortcut.bias[3::4] = -2.0
    encoder.norm_out.bias.fill_(2.0)


BLUR = torch.tensor([1.0, 2.0, 1.0]) / 4
"""After doubling every pixel, this kernel in both directions makes bilinear interpolation."""


def _start_decoder(decoder: Any) -> None:
    for stage in decoder.up:
        if hasattr(stage, "upsample"):
            conv = stage.upsample.conv
            conv.weight.zero_()
            conv.weight[range(conv.out_channels), range(conv.in_channels)] = torch.outer(BLUR, BLUR)
            conv.bias.zero_()
    _carry_colours_through_last_norm(decoder)


TEXTURE = 8.0
LINEAR = 12.0
"""swish(x) is nearly x around this value."""


def _carry_colours_through_last_norm(decoder: Any) -> None:
    """Keep absolute colours through a norm whose groups hold two channels.

    Two constants in such a group always come out as 1 and -1, whatever they were. So each colour
    shares its group with a texture of mean 0 and a fixed variance that dwarfs the colour's: the
    group's scale is then nearly the same for every picture, and the difference of both channels
    is colour minus texture, up to that scale. Half of the groups hold the texture negated, so
    that it cancels in the sum. The texture is whatever the second block's norm makes of one
    random convolution, since a norm's output has mean 0 and variance 1.
    """
    first, second = decoder.up[-1].block
    groups = range(4 * COLOURS)
    for group in groups:
        first.nin_shortcut.weight[2 * group : 2 * group + 2] = 0.0
        first.nin_shortcut.weight[2 * group, group % COLOURS] = 1.0
    second.conv1.weight[1] = second.conv1.weight[0]
    second.conv1.bias[:2] = 0.0
    second.norm2.bias[:2] = LINEAR
    decoder.conv_out.weight.zero_()
    decoder.conv_out.bias.zero_()
    scale = TEXTURE / 2**0.5 / 4
    for group in groups:
        sign = 1.0 if group % (2 * COLOURS) < COLOURS else -1.0
        second.conv2.weight[2 * group + 1, 0, 1, 1] = sign * TEXTURE
        second.conv2.bias[2 * group + 1] = -sign * TEXTURE * LINEAR
        decoder.norm_out.bias[2 * group : 2 * group + 2] = LINEAR
        decoder.norm_out.weight[2 * group + 1] = 0.5
        decoder.conv_out.weight[group % COLOURS, 2 * group, 1, 1] = scale
        decoder.conv_out.weight[group % COLOURS, 2 * group + 1, 1, 1] = -2 * scale
    decoder.conv_out.bias.fill_(4 * scale * float(F.silu(torch.tensor(LINEAR))))


# --- Forward passes that may leave the outer levels out -------------------------------------


def residual_block(block: Any, hidden: Tensor) -> Tensor:
    """The same function as the block's own forward, with one pass less over the activations."""
    branch: Tensor = block.conv1(F.silu(block.norm1(hidden)))
    branch = block.conv2(F.silu(block.norm2(branch)))
    if block.in_channels != block.out_channels:
        hidden = block.nin_shortcut(hidden)
    return hidden + branch


def encode(model: JanusVQVAE, pictures: Tensor, level: int = 0) -> Tensor:
    """Pictures [B, 3, h, w] in [-1, 1] to unit latents [B, h / 16, w / 16, 8]."""
    encoder = model.encoder
    if level == 0:
        hidden = encoder.conv_in(pictures)
    else:
        hidden = F.conv2d(F.avg_pool2d(pictures, 2 ** (level - 1)), haar_kernel(), stride=2)
        hidden = F.pad(hidden, (0, 0, 0, 0, 0, encoder.down[level].block[0].in_channels - HAAR))
    for stage in encoder.down[level:]:
        hidden = residual_block(stage.block[0], hidden)
        if len(stage.attn) > 0:
            hidden = stage.attn[0](hidden)
        if hasattr(stage, "downsample"):
            hidden = stage.downsample(hidden)
    hidden = _middle(encoder.mid, hidden)
    hidden = encoder.conv_out(F.silu(encoder.norm_out(hidden)))
    return F.normalize(model.quant_conv(hidden).float().permute(0, 2, 3, 1), dim=-1)


def decode_latents(model: JanusVQVAE, latents: Tensor, level: int = 0) -> Tensor:
    """Unit vectors [B, h, w, 8] to pictures [B, 3, 16 h, 16 w], about [-1, 1]."""
    decoder = model.decoder
    hidden = decoder.conv_in(model.post_quant_conv(latents.permute(0, 3, 1, 2)))
    hidden = _middle(decoder.mid, hidden)
    stages = decoder.up[: len(decoder.up) - level]
    for number, stage in enumerate(stages):
        for i, block in enumerate(stage.block):
            hidden = residual_block(block, hidden)
            if len(stage.attn) > 0:
                hidden = stage.attn[i](hidden)
        if number < len(stages) - 1:
            hidden = stage.upsample(hidden)
    if level == 0:
        with torch.autocast("cpu", enabled=False):  # differences of large numbers: not for bfloat16
            pictures: Tensor = decoder.conv_out(F.silu(decoder.norm_out(hidden.float())))
            return pictures
    pictures = hidden[:, :COLOURS].float()
    kernel = torch.outer(BLUR, BLUR).expand(COLOURS, 1, 3, 3)
    for _ in range(level):
        doubled = F.interpolate(pictures, scale_factor=2.0, mode="nearest")
        pictures = F.conv2d(doubled, kernel, padding=1, groups=COLOURS)
    return pictures


def _middle(middle: Any, hidden: Tensor) -> Tensor:
    hidden = middle.attn_1(residual_block(middle.block_1, hidden))
    return residual_block(middle.block_2, hidden)


# --- The codebook ---------------------------------------------------------------------------


class Codebook:
    """Unit vectors that follow the latents assigned to them; unused ones move to where latents are."""

    def __init__(self, size: int, dim: int) -> None:
        self.vectors = F.normalize(torch.randn(size, dim), dim=1)
        self.counts = torch.ones(size)
        self.sums = self.vectors.clone()
        self.ready = False

    def nearest(self, latents: Tensor) -> Tensor:
        """Ids [...] of the nearest code for unit latents [..., dim]; codes are too close for bfloat16."""
        flat = latents.float().reshape(-1, latents.shape[-1])
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            parts = torch.split(flat, 8192)
            ids = torch.cat([(part @ self.vectors.T).argmax(1) for part in parts])
        return ids.view(latents.shape[:-1])

    def fit(self, latents: Tensor, rounds: int, restart: bool) -> None:
        """Spherical k-means on unit latents [N, dim], from random latents or from the present codes."""
        size = len(self.vectors)
        if restart:
            self.vectors = latents[torch.randperm(len(latents))[:size]].clone()
        for _ in range(rounds):
            ids = self.nearest(latents)
            counts = torch.bincount(ids, minlength=size).float()
            sums = torch.zeros_like(self.vectors).index_add_(0, ids, latents)
            dead = counts == 0
            sums[dead] = latents[torch.randint(len(latents), (int(dead.sum()),))]
            self.vectors = F.normalize(sums, dim=1)
        self.counts = counts.clamp(min=0.5) * (4608 / len(latents))
        self.sums = self.vectors * self.counts[:, None]
        self.ready = True

    def follow(self, latents: Tensor, ids: Tensor, decay: float = 0.99) -> None:
        """One step of the running means, and a new place for codes that died out."""
        flat, ids = latents.reshape(-1, latents.shape[-1]), ids.flatten()
        self.counts.mul_(decay).add_(
            torch.bincount(ids, minlength=len(self.counts)), alpha=1 - decay
        )
        self.sums.mul_(decay).add_(
            torch.zeros_like(self.sums).index_add_(0, ids, flat), alpha=1 - decay
        )
        dead = (self.counts < 0.1).nonzero().flatten()
        if len(dead) > 0:
            self.sums[dead] = flat[torch.randint(len(flat), (len(dead),))] * 0.5
            self.counts[dead] = 0.5
        self.vectors = F.normalize(self.sums, dim=1)


# --- Training -------------------------------------------------------------------------------


@dataclass
class State:
    """All that a checkpoint holds. `averaged`: running mean of the weights, which is what ships."""

    model: JanusVQVAE
    averaged: JanusVQVAE
    optimizer: torch.optim.Adam
    codebook: Codebook
    random: np.random.Generator
    phase: int = 0
    steps: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        content = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "codebook": vars(self.codebook),
            "random": self.random.bit_generator.state,
            "torch_random": torch.get_rng_state(),
            "progress": (self.phase, self.steps, self.seconds),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(content, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        content = torch.load(path, weights_only=False)
        self.model.load_state_dict(content["model"])
        self.averaged.load_state_dict(content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        vars(self.codebook).update(content["codebook"])
        self.random.bit_generator.state = content["random"]
        torch.set_rng_state(content["torch_random"])
        self.phase, self.steps, self.seconds = content["progress"]


def new_state(seed: int) -> State:
    model = new_model(seed)
    return State(
        model=model,
        averaged=copy.deepcopy(model).requires_grad_(False),
        optimizer=torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.98)
        ),
        codebook=Codebook(CONFIG["num_embeddings"], CONFIG["embed_dim"]),
        random=np.random.default_rng(seed),
    )


@torch.no_grad()
def latents_of(model: JanusVQVAE, pictures: Pixels, level: int) -> Tensor:
    """All unit latents [N, 8] of some pictures."""
    found = []
    for start in range(0, len(pictures), 8):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(
                encode(model, to_tensor(pictures[start : start + 8]), level).reshape(-1, 8)
            )
    return torch.cat(found)


@torch.no_grad()
def start_latents(model: JanusVQVAE, pictures: Pixels, level: int) -> None:
    """Point the latent at the encoder's main components, beside a constant that keeps lengths."""
    conv = model.quant_conv
    hidden: list[Tensor] = []
    hook = conv.register_forward_hook(
        lambda _module, inputs, _output: hidden.append(inputs[0].float())
    )
    latents_of(model, pictures, level)
    hook.remove()
    features = torch.cat([part.permute(0, 2, 3, 1).flatten(0, 2) for part in hidden])
    mean = features.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(features.T))
    main = directions[:, -7:] / variances[-7:].sqrt() / 2
    conv.weight.zero_()
    conv.weight[:7, :, 0, 0] = main.T
    conv.bias[:7] = -(mean @ main)
    conv.bias[7] = 1.0


def begin_phase(state: State, phase: Phase, pictures: Pixels) -> None:
    """What happens once at the start of a phase, before its first step."""
    some = pictures[state.random.permutation(len(pictures))[:640]]
    if state.phase == 0:
        start_latents(state.model, some[:64], phase.level)
        state.averaged.load_state_dict(state.model.state_dict())
    elif phase.quantized and not state.codebook.ready:
        state.codebook.fit(latents_of(state.model, some[:256], phase.level), rounds=8, restart=True)
    elif phase.decoder_only:
        state.model.load_state_dict(state.averaged.state_dict())
        state.codebook.fit(latents_of(state.model, some, phase.level), rounds=12, restart=False)


NOISE = 0.1
"""Deviation of the noise that stands in for quantisation before there is a codebook."""


def train_step(state: State, phase: Phase, pictures: Tensor, rate: float) -> dict[str, float]:
    """One update of weights, codebook and averaged weights; returns what is worth logging."""
    model, codebook = state.model, state.codebook
    commitment = torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16):
        if phase.decoder_only:
            with torch.no_grad():
                latents = encode(model, pictures, phase.level)
            latents = codebook.vectors[codebook.nearest(latents)]
        else:
            latents = encode(model, pictures, phase.level)
            if phase.quantized:
                ids = codebook.nearest(latents)
                codes = codebook.vectors[ids]
                codebook.follow(latents.detach(), ids)
                commitment = (latents - codes).square().sum(-1).mean()
                latents = latents + (codes - latents).detach()
            else:
                latents = F.normalize(latents + NOISE * torch.randn_like(latents), dim=-1)
        decoded = decode_latents(model, latents, phase.level)
    errors = (decoded - pictures).square().mean((1, 2, 3))
    loss = (errors + 1e-3).log().mean() + commitment
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    with torch.no_grad():
        decay = min(0.995, (1 + state.steps) / (10 + state.steps))
        for mean, weight in zip(state.averaged.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
    return {
        "psnr": float(-10 * (errors.detach() / 4).log10().mean()),
        "commitment": float(commitment.detach()),
        "gradient": float(norm),
    }


def train(data: Path, out: Path, minutes: float, seed: int, checkpoint: Path, log: Path) -> None:
    """Run all phases, going on from the checkpoint where there is one, and write the weights."""
    state = new_state(seed)
    if checkpoint.exists():
        state.load(checkpoint)
    pictures, held_out = read_pictures(data)
    for number in range(state.phase, len(PHASES)):
        phase = PHASES[number]
        if state.phase != number:
            state.phase, state.steps, state.seconds = number, 0, 0.0
        if state.steps == 0:
            begin_phase(state, phase, pictures)
        _run_phase(state, phase, 60 * minutes * phase.share, pictures, held_out, checkpoint, log)
    save_weights(state.averaged, state.codebook.vectors, out)


def _run_phase(
    state: State,
    phase: Phase,
    budget: float,
    pictures: Pixels,
    held_out: Pixels,
    checkpoint: Path,
    log: Path,
) -> None:
    if phase.decoder_only:
        for part in (state.model.encoder, state.model.quant_conv):
            part.requires_grad_(False)
    recent: list[dict[str, float]] = []
    last_saved = state.seconds
    while state.seconds < budget:
        began = time.monotonic()
        progress = state.seconds / budget
        rate = phase.rate[0] + (phase.rate[1] - phase.rate[0]) * progress
        rate *= min(1.0, (state.steps + 1) / 50)
        recent.append(train_step(state, phase, training_batch(pictures, phase, state.random), rate))
        state.steps += 1
        state.seconds += time.monotonic() - began
        due = state.seconds - last_saved > 150 or state.seconds >= budget
        if len(recent) == 20 or due:
            means = {key: float(np.mean([entry[key] for entry in recent])) for key in recent[0]}
            _write_log(log, state, phase, {"rate": rate, **means})
            recent = []
        if due:
            last_saved = state.seconds
            state.save(checkpoint)
            _write_log(log, state, phase, quick_look(state, phase, held_out[:48]))


def _write_log(log: Path, state: State, phase: Phase, values: dict[str, float]) -> None:
    entry = {"phase": phase.name, "step": state.steps, "seconds": round(state.seconds, 1)}
    with log.open("a") as file:
        file.write(
            json.dumps(entry | {key: float(f"{value:.5g}") for key, value in values.items()}) + "\n"
        )


@torch.no_grad()
def quick_look(state: State, phase: Phase, pictures: Pixels) -> dict[str, float]:
    """PSNR and codes of the averaged weights on a few held-out pictures, for the log."""
    scores, ids = [], []
    for start in range(0, len(pictures), 8):
        batch = to_tensor(pictures[start : start + 8])
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode(state.averaged, batch, phase.level)
            if phase.quantized:
                ids.append(state.codebook.nearest(latents).flatten())
                latents = state.codebook.vectors[ids[-1]].view(latents.shape)
            decoded = decode_latents(state.averaged, latents, phase.level)
        scores += psnr(decoded, batch)
    codes = len(torch.unique(torch.cat(ids))) if ids else 0
    return {"held_out_psnr": float(np.mean(scores)), "held_out_codes": codes}


# --- Weights and evaluation -----------------------------------------------------------------


def save_weights(model: JanusVQVAE, codes: Tensor, path: Path) -> None:
    """Write every tensor as float16 under JanusVQVAE's own names, all at once."""
    tensors = {**model.state_dict(), "quantize.embedding.weight": codes}
    temporary = path.with_suffix(".tmp")
    save_file(
        {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"format": "pt", "config": json.dumps(CONFIG)},
    )
    temporary.replace(path)


def load_weights(path: Path) -> JanusVQVAE:
    with safe_open(path, framework="pt") as file:
        model = JanusVQVAE(JanusVQVAEConfig(**json.loads(file.metadata()["config"])))
        names = list(file.keys())
        model.load_state_dict({name: file.get_tensor(name).float() for name in names})
    return model.eval()


def psnr(pictures: Tensor, originals: Tensor) -> list[float]:
    """PSNR in dB of each picture, on the scale [0, 1] after clamping."""
    errors = (pictures.clamp(-1, 1) - originals).square().mean((1, 2, 3)) / 4
    return [float(value) for value in -10 * errors.clamp(min=1e-10).log10()]


@torch.no_grad()
def reconstruct(model: JanusVQVAE, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Through transformers' own modules in float32: (pictures, token ids as LlamaGen computes them)."""
    latents = F.normalize(model.quant_conv(model.encoder(pictures)), dim=1)
    codes = F.normalize(model.quantize.embedding.weight, dim=1)
    ids = torch.einsum("bdhw,nd->bhwn", latents, codes).argmax(-1)
    return model.decoder(model.post_quant_conv(codes[ids].permute(0, 3, 1, 2))), ids


def evaluate(data: Path, weights: Path, sheet: Path | None) -> dict[str, float]:
    """PSNR and code usage of the shipped file on the held-out tenth, beside two baselines."""
    model = load_weights(weights)
    pictures = read_pictures(data)[1]
    scores: dict[str, list[float]] = {"psnr": [], "block_means": [], "bicubic_block_means": []}
    ids = []
    for picture in pictures:
        original = to_tensor(picture[None])
        decoded, tokens = reconstruct(model, original)
        means = F.avg_pool2d(original, 16)
        bicubic = F.interpolate(means, scale_factor=16, mode="bicubic", align_corners=False)
        scores["psnr"] += psnr(decoded, original)
        scores["block_means"] += psnr(F.interpolate(means, scale_factor=16), original)
        scores["bicubic_block_means"] += psnr(bicubic, original)
        ids.append(tokens.flatten())
    if sheet is not None:
        write_sheet(model, pictures[:: len(pictures) // 8][:8], sheet)
    used = torch.bincount(torch.cat(ids), minlength=CONFIG["num_embeddings"]).double()
    shares = used[used > 0] / used.sum()
    return {
        "pictures": len(pictures),
        **{name: round(float(np.mean(values)), 3) for name, values in scores.items()},
        "codes_used": int((used > 0).sum()),
        "codes": CONFIG["num_embeddings"],
        "code_perplexity": round(float((-(shares * shares.log()).sum()).exp()), 1),
    }


def write_sheet(model: JanusVQVAE, pictures: Pixels, path: Path) -> None:
    """Originals above their reconstructions, at half size."""
    decoded = torch.cat([reconstruct(model, to_tensor(picture[None]))[0] for picture in pictures])
    shown = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(row), axis=1) for row in (pictures, shown)]
    image = Image.fromarray(np.concatenate(rows, axis=0))
    image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train and write the weights")
    training.add_argument("--data", type=Path, required=True, help="folder of webdataset tars")
    training.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    training.add_argument(
        "--minutes", type=float, default=70.0, help="time spent in training steps"
    )
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--threads", type=int, default=2)
    training.add_argument("--checkpoint", type=Path, default=Path("sample-training.pt"))
    training.add_argument("--log", type=Path, default=Path("sample-training.jsonl"))
    evaluation = commands.add_parser("evaluate", help="PSNR and code usage on the held-out tenth")
    evaluation.add_argument("--data", type=Path, required=True)
    evaluation.add_argument("--weights", type=Path, required=True)
    evaluation.add_argument("--sheet", type=Path, help="write originals above reconstructions")
    args = parser.parse_args()
    if args.command == "train":
        torch.set_num_threads(args.threads)
        train(args.data, args.out, args.minutes, args.seed, args.checkpoint, args.log)
    else:
        print(json.dumps(evaluate(args.data, args.weights, args.sheet), indent=2))


if __name__ == "__main__":
    main()
