"""The plain loop that encoding is held against: decode ahead, run the network, nothing else.

In: a tokenizer's network and encoded pictures. Out: pictures a second and their tokens. The loop
knows nothing of shards, rejects, ids or tables; `best_loops` gives it every chance.
"""

import copy
import ctypes
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from arrag_runtime.tokenizers.vq16 import VQTokenizer
from stages.encode.decode import DecodeSettings, decode_image

Array = npt.NDArray[Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def keep_memory() -> None:
    """Have glibc keep what is freed instead of handing it back to the kernel.

    Large activations are otherwise mapped, zeroed page by page and unmapped at every layer.
    """
    threshold, trim, arenas = -3, -1, -8
    library = ctypes.CDLL(None)
    for setting, value in ((arenas, 1), (threshold, 1 << 30), (trim, (1 << 31) - 1)):
        library.mallopt(setting, value)


@dataclass(frozen=True)
class Loop:
    """One form of the bare loop: `lanes` threads, each with `threads` torch threads of its own."""

    dtype: str
    memory: str
    batch: int
    lanes: int = 1
    threads: int = 1

    @property
    def kind(self) -> tuple[str, str]:
        """Its dtype and memory format."""
        return self.dtype, self.memory

    def __str__(self) -> str:
        split = f"{self.lanes} x {self.threads} threads"
        return f"{self.dtype}, {self.memory}, batch {self.batch}, {split}"


class Bare:
    """The tokenizer's network in a plain loop, nothing around it."""

    def __init__(self, tokenizer: VQTokenizer, device: str = "cpu") -> None:
        self._model = copy.deepcopy(tokenizer._model)
        self._models: dict[tuple[str, str], Any] = {}
        self._device = device
        self._codes = torch.from_numpy(tokenizer.codebook()).to(device)
        self._decode = DecodeSettings(size=tokenizer.spec.image_size)

    def place(self, pixels: Array, dtype: str, memory: str) -> torch.Tensor:
        """Pictures uint8 [B, s, s, 3] as the network's input."""
        placed = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        return (placed.to(DTYPES[dtype]) / 127.5 - 1).contiguous(memory_format=FORMATS[memory])

    @torch.inference_mode()
    def ids(self, pixels: torch.Tensor, dtype: str, memory: str) -> torch.Tensor:
        """Token ids int64 [B, h, w]."""
        if (dtype, memory) not in self._models:
            made = copy.deepcopy(self._model).to(self._device, DTYPES[dtype])
            self._models[dtype, memory] = made.to(memory_format=FORMATS[memory])
        model = self._models[dtype, memory]
        z = model.quant_conv(model.encoder(pixels)).float().permute(0, 2, 3, 1)
        return (torch.nn.functional.normalize(z, dim=-1) @ self._codes.T).argmax(-1)

    def run(self, loop: Loop, pictures: Sequence[bytes]) -> tuple[float, Array]:
        """Pictures a second and their tokens [N, h, w] in order."""
        torch.set_num_threads(loop.threads)
        black = np.zeros((loop.batch, self._decode.size, self._decode.size, 3), np.uint8)
        self.ids(self.place(black, *loop.kind), *loop.kind)
        tokens: list[Any] = [None] * loop.lanes
        started = time.perf_counter()
        with ThreadPoolExecutor(loop.lanes) as lanes:
            parts = [pictures[lane :: loop.lanes] for lane in range(loop.lanes)]
            for lane, done in enumerate(lanes.map(lambda part: self._lane(loop, part), parts)):
                tokens[lane] = done
        seconds = time.perf_counter() - started
        ordered = np.empty((len(pictures), *tokens[0].shape[1:]), tokens[0].dtype)
        for lane, part in enumerate(tokens):
            ordered[lane :: loop.lanes] = part
        return len(pictures) / seconds, ordered

    def _lane(self, loop: Loop, pictures: Sequence[bytes]) -> Array:
        tokens = []
        pixels = self._decoded(pictures, ahead=2 + 2 * loop.batch)
        while batch := list(itertools.islice(pixels, loop.batch)):
            placed = self.place(np.stack(batch), *loop.kind)
            tokens.append(self.ids(placed, *loop.kind).numpy())
        return np.concatenate(tokens)

    def _decoded(self, pictures: Sequence[bytes], ahead: int) -> Iterator[Array]:
        waiting: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(2) as threads:
            for data in pictures:
                waiting.append(threads.submit(decode_image, data, self._decode))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result().pixels
            while waiting:
                yield waiting.popleft().result().pixels


def best_loops(bare: Bare, pictures: Sequence[bytes], threads: int, wanted: str) -> dict[str, Loop]:
    """The fastest form in the `wanted` dtype, and of the fastest dtype where that is another.

    All forms are tried on a few pictures, the best three of each dtype on all.
    """
    best = {}
    rates = {}
    splits = {(1, threads), (threads, 1)}
    for dtype in DTYPES:
        forms = [
            Loop(dtype, memory, batch, *split)
            for memory, batch, split in itertools.product(FORMATS, (1, 2, 4, 8), sorted(splits))
        ]
        few = pictures[: max(8, len(pictures) // 3)]
        forms.sort(key=lambda form: -bare.run(form, few)[0])
        tried = {form: bare.run(form, pictures)[0] for form in forms[:3]}
        best[dtype] = max(tried, key=lambda form: tried[form])
        rates[dtype] = tried[best[dtype]]
    fastest = max(rates, key=lambda dtype: rates[dtype])
    return {dtype: best[dtype] for dtype in DTYPES if dtype in (wanted, fastest)}
