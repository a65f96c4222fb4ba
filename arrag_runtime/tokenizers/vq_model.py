"""The network of VQ-16 (LlamaGen, arXiv 2406.06525, section 2.1): convolutions down and up again.

In: pictures [B, 3, H, W] in -1..1, or latents of a grid. Out: latents, or pictures. Each level but
the last halves the sides; attention stands in the last level and in the middle. The names of the
parameters are those of transformers' JanusVQVAE, and so is the order of operations, so the same
weights give the same numbers to the bit. Searching the codebook is the tokenizer's part.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VQShape:
    """The widths of a VQ network."""

    base: int
    """Channels after the encoder's first convolution."""
    widths: tuple[int, ...]
    """Channels of each level, from the picture's own resolution down."""
    blocks: int
    """Residual blocks in a level of the encoder; the decoder has one more."""
    latent: int
    """Channels between encoder and codebook."""
    codes: int
    """Entries of the codebook."""
    dimension: int
    """Channels of a code."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "VQShape":
        """The shape that weights have. Raises KeyError or ValueError for other weights."""
        first = re.compile(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
        found = ((first.fullmatch(name), tensor.shape[0]) for name, tensor in state.items())
        levels = {int(match[1]): width for match, width in found if match}
        block = re.compile(r"encoder\.down\.0\.block\.(\d+)\.")
        codes, dimension = state["quantize.embedding.weight"].shape
        if not levels:
            raise ValueError("the encoder has no levels")
        return cls(
            base=state["encoder.conv_in.weight"].shape[0],
            widths=tuple(levels[level] for level in sorted(levels)),
            blocks=len({m[1] for name in state if (m := block.match(name))}),
            latent=state["quant_conv.weight"].shape[1],
            codes=codes,
            dimension=dimension,
        )


class VQModel(nn.Module):
    """Encoder, codebook and decoder.

    Latents to be looked up are `quant_conv(encoder(pictures))` [B, d, h, w]; pictures of codes
    [B, d, h, w] are `decoder(post_quant_conv(codes))`.
    """

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = _Encoder(shape), _Decoder(shape)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(shape.codes, shape.dimension)})
        self.quant_conv = nn.Conv2d(shape.latent, shape.dimension, 1)
        self.post_quant_conv = nn.Conv2d(shape.dimension, shape.latent, 1)

    @classmethod
    def load(cls, state: Mapping[str, Tensor]) -> "VQModel":
        """The frozen network in float32 with a copy of these weights; every name must match."""
        with torch.device("meta"):  # weights are not drawn before they are replaced
            model = cls(VQShape.of(state))
        model.to_empty(device="cpu").load_state_dict(state, strict=True)
        return model.eval().requires_grad_(False)

    @property
    def codebook(self) -> Tensor:
        """The codes as they are stored [V, d], not normalised."""
        weight = self.quantize["embedding"].weight
        assert isinstance(weight, Tensor)
        return weight


class _Encoder(nn.Module):
    """Pictures [B, 3, H, W] to [B, latent, H / s, W / s] with s = 2^(levels - 1)."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = nn.Conv2d(3, shape.base, 3, padding=1)
        self.down = nn.Sequential()
        for level, enters in enumerate((shape.base, *widths[:-1])):
            last = level == len(widths) - 1
            then = None if last else "downsample"
            self.down.append(_Level(enters, widths[level], shape.blocks, attention=last, then=then))
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], shape.latent, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(pictures)))
        out: Tensor = self.conv_out(_swish(self.norm_out(x)))
        return out


class _Decoder(nn.Module):
    """[B, latent, h, w] to pictures [B, 3, s · h, s · w]; its levels begin with the coarsest."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        widths = shape.widths[::-1]
        self.conv_in = nn.Conv2d(shape.latent, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.up = nn.Sequential()
        for level, enters in enumerate((widths[0], *widths[:-1])):
            then = None if level == len(widths) - 1 else "upsample"
            blocks, first = shape.blocks + 1, level == 0
            self.up.append(_Level(enters, widths[level], blocks, attention=first, then=then))
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.up(self.mid(self.conv_in(latents)))
        out: Tensor = self.conv_out(_swish(self.norm_out(x)))
        return out


class _Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where there is any.

    then: "downsample" or "upsample", what leads to the next level; None for the last.
    """

    def __init__(
        self, enters: int, width: int, blocks: int, *, attention: bool, then: str | None
    ) -> None:
        super().__init__()
        widths = (enters, *[width] * blocks)
        self.block = nn.ModuleList(_ResnetBlock(widths[n], width) for n in range(blocks))
        self.attn = nn.ModuleList(_Attention(width) for _ in range(blocks if attention else 0))
        self.downsample = _downsample(width) if then == "downsample" else nn.Identity()
        self.upsample = _upsample(width) if then == "upsample" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        resized: Tensor = self.upsample(self.downsample(x))
        return resized


class _ResnetBlock(nn.Module):
    """Twice norm, swish and convolution, added to what came in."""

    def __init__(self, enters: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(enters)
        self.conv1 = nn.Conv2d(enters, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if enters == width else nn.Conv2d(enters, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv1(_swish(self.norm1(x)))
        out: Tensor = self.nin_shortcut(x) + self.conv2(_swish(self.norm2(change)))
        return out


class _Attention(nn.Module):
    """One head over all cells, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2) for part in (self.q, self.k, self.v))
        shares = (torch.bmm(q.permute(0, 2, 1), k) * q.shape[1] ** -0.5).softmax(dim=2)
        seen = torch.bmm(v, shares.permute(0, 2, 1)).reshape(x.shape)
        out: Tensor = x + self.proj_out(seen)
        return out


def _middle(width: int) -> nn.Module:
    """Two residual blocks around attention."""
    first, attn, last = _ResnetBlock(width, width), _Attention(width), _ResnetBlock(width, width)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=attn, block_2=last))


def _downsample(width: int) -> nn.Module:
    """Half the sides: a convolution of stride 2 over the picture padded right and below."""
    padding, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=padding, conv=conv))


def _upsample(width: int) -> nn.Module:
    """Twice the sides: every cell repeated, then a convolution."""
    repeat, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=repeat, conv=conv))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def _swish(x: Tensor) -> Tensor:
    """x · sigmoid(x), in place; torch's own silu rounds otherwise."""
    x *= torch.sigmoid(x)
    return x
