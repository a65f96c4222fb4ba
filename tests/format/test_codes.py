"""Keys as packed bits, against Python's integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrag_runtime.format.codes import CodeLayout, code_bits, code_size, pack_keys, unpack_keys
from arrag_runtime.format.errors import IncompatibleError
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.specs import key_spec, key_vectors, normalised


@given(
    neighbors=st.integers(1, 24),
    bits=st.integers(1, 17),
    count=st.integers(0, 5),
    missing=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_keys_are_the_bytes_of_one_integer(
    neighbors: int, bits: int, count: int, missing: bool, seed: int
) -> None:
    """The first neighbour's token in the lowest bits; "missing" is one more than the last token."""
    # The last token that fits, less one place for "missing".
    vocabulary = min((1 << bits) - 1, MISSING)
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, vocabulary, (count, neighbors)).astype(np.uint16)
    if missing:
        keys[rng.random(keys.shape) < 0.3] = MISSING
    codes = pack_keys(keys, bits, vocabulary)
    assert codes.shape == (count, code_size(neighbors, bits))
    for key, code in zip(keys.tolist(), codes, strict=True):
        whole = 0
        for place, token in enumerate(key):
            whole |= (vocabulary if token == MISSING else token) << (place * bits)
        assert code.tobytes() == whole.to_bytes(-(-neighbors * bits // 8), "little")
    assert np.array_equal(unpack_keys(codes, neighbors, bits, vocabulary), keys)


@pytest.mark.parametrize(
    ("border", "vocabulary", "bits"),
    [
        ("skip", 1, 1),
        ("skip", 2, 1),
        ("zero", 2, 2),
        ("skip", 24, 5),
        ("skip", 32, 5),
        ("zero", 31, 5),
        ("zero", 32, 6),
        ("skip", 16384, 14),
        ("zero", 16384, 15),
    ],
)
def test_a_code_has_room_for_every_token(border: str, vocabulary: int, bits: int) -> None:
    """And, where neighbours may be missing, for one more; no bit beyond that."""
    assert code_bits(key_spec("causal-1", border, "codebook"), vocabulary) == bits


def test_seven_bytes_a_key() -> None:
    """The released tokenizer's causal keys: four tokens of fourteen bits."""
    codes = np.zeros((16384, 8), np.float32)
    assert CodeLayout(key_spec("causal-1", "skip", "codebook"), codes).size == 7
    assert CodeLayout(key_spec("causal-1", "zero", "codebook"), codes).size == 8


def test_latent_keys_have_no_codes() -> None:
    with pytest.raises(IncompatibleError, match=r"latent space .* --kind ivfpq"):
        code_bits(key_spec("causal-1", "skip", "latent"), 24)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 0.0, 1.5)])
def test_centroids_are_what_keys_are_made_of(weights: tuple[float, ...] | None) -> None:
    """Each neighbour's code points at its part of the search vector; unused codes are zeros."""
    codes = normalised(np.random.default_rng(0).normal(size=(21, 3)))
    layout = CodeLayout(key_spec("causal-1", "zero", "codebook"), codes, weights)
    keys = np.array([[0, 20, MISSING, 7], [MISSING] * 4], np.uint16)
    table = layout.centroids()
    assert table.shape == (4, 32, 3)
    assert layout.dimension == 12
    numbers = np.where(keys == MISSING, 21, keys)
    built = table[np.arange(4), numbers].reshape(2, 12)
    assert np.allclose(built, key_vectors(keys, codes, weights), atol=1e-7)
    assert not table[:, 21:].any()
