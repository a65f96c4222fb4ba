"""Keys as packed bits: the codes of the codebook index.

A key of n tokens becomes n · bits bits, the first neighbour's in the lowest, little-endian, in
whole bytes: the layout in which faiss' product quantiser reads its codes. Where a neighbourhood can
miss neighbours, "missing" is one code more than the codebook has.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import IncompatibleError
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.specs import Floats, KeySpec


@dataclass(frozen=True)
class CodeLayout:
    """How keys become codes."""

    keys: KeySpec
    codes: Floats
    """The normalised codebook, float32 [V, d]."""
    weights: tuple[float, ...] | None = None
    """One per offset, None for equal ones."""

    @property
    def bits(self) -> int:
        """Bits per neighbour: enough for every token and, with border = zero, for "missing".

        Raises IncompatibleError for latent keys, which are no tokens.
        """
        if self.keys.space != "codebook":
            raise IncompatibleError(
                f"keys in {self.keys.space} space are vectors, not tokens, so they have no codes;"
                " index them with --kind ivfpq"
            )
        values = len(self.codes) + (self.keys.neighborhood.border == "zero")
        return max(1, (values - 1).bit_length())

    @property
    def size(self) -> int:
        """Bytes per key."""
        return (self.keys.neighborhood.size * self.bits + 7) // 8

    @property
    def dimension(self) -> int:
        """The length n · d of a search vector."""
        return self.keys.neighborhood.size * int(self.codes.shape[1])

    def centroids(self) -> Floats:
        """The sub-quantisers' centroids float32 [n, 2^bits, d]; unused codes are zero vectors.

        So is the code after the codebook's last one, which stands for a missing neighbour.
        """
        neighbors, (vocabulary, dimension) = self.keys.neighborhood.size, self.codes.shape
        table = np.zeros((neighbors, 1 << self.bits, dimension), np.float32)
        table[:, :vocabulary] = self.codes
        if self.weights is not None:
            table *= np.sqrt(np.asarray(self.weights, np.float32))[:, None, None]
        return table

    def pack(self, keys: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
        """Token keys uint16 [N, n] as codes uint8 [N, size]. `MISSING` becomes V."""
        count, neighbors = keys.shape
        bits = self.bits
        words = np.zeros((count, -(-neighbors * bits // 64)), "<u8")
        for neighbor in range(neighbors):
            token = keys[:, neighbor].astype(np.uint64)
            token[keys[:, neighbor] == MISSING] = len(self.codes)
            word, shift = divmod(neighbor * bits, 64)
            words[:, word] |= token << np.uint64(shift)
            if shift + bits > 64:
                words[:, word + 1] |= token >> np.uint64(64 - shift)
        return np.ascontiguousarray(words.view(np.uint8)[:, : self.size])

    def unpack(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
        """The token keys uint16 [N, n] that `pack` packed."""
        count, neighbors, bits = len(codes), self.keys.neighborhood.size, self.bits
        whole = np.zeros((count, 8 * -(-neighbors * bits // 64)), np.uint8)
        whole[:, : codes.shape[1]] = codes
        words = whole.view("<u8")
        keys = np.empty((count, neighbors), np.uint16)
        mask = np.uint64((1 << bits) - 1)
        for neighbor in range(neighbors):
            word, shift = divmod(neighbor * bits, 64)
            token = words[:, word] >> np.uint64(shift)
            if shift + bits > 64:
                token = token | words[:, word + 1] << np.uint64(64 - shift)
            keys[:, neighbor] = token & mask
        keys[keys == len(self.codes)] = MISSING
        return keys
