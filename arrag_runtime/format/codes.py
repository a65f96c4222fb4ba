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

_TokenKeys = npt.NDArray[np.uint16]
_Codes = npt.NDArray[np.uint8]


def code_bits(keys: KeySpec, vocabulary: int) -> int:
    """Bits per neighbour: enough for every token and, with border = zero, for "missing".

    Raises IncompatibleError for latent keys, which are no tokens.
    """
    if keys.space != "codebook":
        raise IncompatibleError(
            f"keys in {keys.space} space are vectors, not tokens, so they have no codes; index them"
            " with --kind ivfpq"
        )
    values = vocabulary + (keys.neighborhood.border == "zero")
    return max(1, (values - 1).bit_length())


def code_size(neighbors: int, bits: int) -> int:
    """Bytes that a key takes."""
    return (neighbors * bits + 7) // 8


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
        """Bits per neighbour."""
        return code_bits(self.keys, len(self.codes))

    @property
    def size(self) -> int:
        """Bytes per key."""
        return code_size(self.keys.neighborhood.size, self.bits)

    @property
    def dimension(self) -> int:
        """The length n · d of a search vector."""
        return self.keys.neighborhood.size * self.codes.shape[1]

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


def pack_keys(keys: _TokenKeys, bits: int, vocabulary: int) -> _Codes:
    """Token keys uint16 [N, n] as codes uint8 [N, code_size]. `MISSING` becomes `vocabulary`."""
    count, neighbors = keys.shape
    words = np.zeros((count, -(-neighbors * bits // 64)), "<u8")
    for neighbor in range(neighbors):
        token = keys[:, neighbor].astype(np.uint64)
        token[keys[:, neighbor] == MISSING] = vocabulary
        word, shift = divmod(neighbor * bits, 64)
        words[:, word] |= token << np.uint64(shift)
        if shift + bits > 64:
            words[:, word + 1] |= token >> np.uint64(64 - shift)
    return np.ascontiguousarray(words.view(np.uint8)[:, : code_size(neighbors, bits)])


def unpack_keys(codes: _Codes, neighbors: int, bits: int, vocabulary: int) -> _TokenKeys:
    """The token keys uint16 [N, n] that `pack_keys` packed."""
    count = len(codes)
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
    keys[keys == vocabulary] = MISSING
    return keys
