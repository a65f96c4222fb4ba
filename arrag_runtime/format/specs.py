"""Specifications: what a tokenizer and a key are, frozen, with a fingerprint."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.neighborhood import MISSING, Neighborhood, neighborhood

KeySpace = Literal["codebook", "latent"]
KEY_SPACES: tuple[KeySpace, ...] = ("codebook", "latent")
SAME_CODE_COSINE = 0.999
"""Two codebooks are the same when every row's cosine is at least this."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as far as its tokens depend on it."""

    name: str
    image_size: int
    """The side of the square picture that it takes, in pixels."""
    grid_height: int
    grid_width: int
    vocabulary: int
    """The number of codes V."""
    dimension: int
    """The length d of a code."""
    preparation: str
    """How a picture becomes pixels, which changes tokens too."""
    weights_sha256: str
    """Recorded, not compared: the same tokenizer ships in several files and precisions."""

    @property
    def positions(self) -> int:
        """The number of grid positions h · w."""
        return self.grid_height * self.grid_width

    def fingerprint(self) -> str:
        """16 hex digits over everything but the weights file."""
        fields = {k: v for k, v in asdict(self).items() if k != "weights_sha256"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.name} ({self.grid_height}x{self.grid_width} grid of {self.image_size}px,"
            f" {self.vocabulary} codes x {self.dimension}, {self.preparation})"
        )


def require_same_tokenizer(
    have: TokenizerSpec, have_codes: Floats, want: TokenizerSpec, want_codes: Floats
) -> None:
    """Raise IncompatibleError, naming both, unless tokens of the two mean the same.

    have_codes, want_codes: float32 [V, d], rows L2-normalised.
    """
    if have.fingerprint() != want.fingerprint():
        raise IncompatibleError(
            f"the database holds tokens of {have.describe()}, not of {want.describe()};"
            " use another --db, or the database's own --tokenizer"
        )
    lowest = float((have_codes * want_codes).sum(axis=1).min())
    if lowest < SAME_CODE_COSINE:
        raise IncompatibleError(
            f"the codebook of {want.describe()} differs from the database's (lowest cosine of a row"
            f" {lowest:.4f}, needed {SAME_CODE_COSINE}); use the weights the database was built with"
        )


@dataclass(frozen=True)
class KeySpec:
    """What a patches table holds: whose neighbours, and in which space."""

    neighborhood: Neighborhood
    space: KeySpace = "codebook"
    """Keys are tokens, which stand for codebook rows, or latents: normalised, not quantised."""

    @property
    def name(self) -> str:
        """The name of its table: neighbourhood, border, space."""
        return f"{self.neighborhood.name}-{self.neighborhood.border}-{self.space}"

    def to_json(self) -> dict[str, str]:
        """As a manifest holds it."""
        return {
            "neighborhood": self.neighborhood.name,
            "border": self.neighborhood.border,
            "key_space": self.space,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "KeySpec":
        """The spec that `to_json` wrote. Raises BadInputError for unknown names."""
        return key_spec(fields["neighborhood"], fields["border"], fields["key_space"])


def key_spec(hood: str, border: str, space: str) -> KeySpec:
    """A KeySpec from the names users type. Raises BadInputError for unknown ones."""
    for known in KEY_SPACES:
        if space == known:
            return KeySpec(neighborhood(hood, border), known)
    raise BadInputError(f"unknown key space '{space}'; choose one of {', '.join(KEY_SPACES)}")


def normalised(codebook: npt.NDArray[Any]) -> Floats:
    """A codebook [V, d] as float32 with L2-normalised rows."""
    codes = np.asarray(codebook, dtype=np.float32)
    unit: Floats = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    return unit


def key_vectors(
    keys: npt.NDArray[Any], codes: Floats, weights: tuple[float, ...] | None = None
) -> Floats:
    """Keys as search vectors: float32 [N, n · d].

    keys: uint16 tokens [N, n], looked up in the normalised codebook `codes` [V, d] with a zero
    vector for `MISSING`; or float latents [N, n · d], cast. weights: one per offset, none negative;
    each neighbour's vector is scaled by the root of its weight w_o, so that the squared L2 distance
    of two such vectors is Σ_o w_o · ‖q_o − k_o‖².
    Raises BadInputError for a token outside the codebook, or another number of weights than n.
    """
    vocabulary, dimension = codes.shape
    if keys.dtype.kind == "f":
        vectors: Floats = np.ascontiguousarray(keys, dtype=np.float32)
    else:
        missing = keys == MISSING
        outside = keys[(keys >= vocabulary) & ~missing]
        if outside.size:
            raise BadInputError(
                f"token {int(outside[0])} is outside the codebook of {vocabulary} codes;"
                f" tokens are 0..{vocabulary - 1}"
            )
        vectors = codes[np.where(missing, 0, keys)]
        vectors[missing] = 0
        vectors = vectors.reshape(len(keys), keys.shape[1] * dimension)
    if weights is None:
        return vectors
    neighbors = vectors.shape[1] // dimension
    if len(weights) != neighbors or min(weights) < 0:
        raise BadInputError(
            f"{len(weights)} weights {weights} for keys of {neighbors} neighbours; give one for each"
            " offset, none negative"
        )
    scaled: Floats = vectors * np.repeat(np.sqrt(np.asarray(weights, np.float32)), dimension)
    return scaled


def squared_distances(one: Floats, other: Floats) -> Floats:
    """‖x − y‖² over the last axis of vectors float32 [.., D], value by value, so that it is exact.

    Other axes are broadcast. Between `key_vectors` it is the distance that every index stands for.
    """
    apart = one - other
    squares: Floats = np.einsum("...d,...d->...", apart, apart)
    return squares
