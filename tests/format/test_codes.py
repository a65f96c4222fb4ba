"""Keys as packed bits, against Python's integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import IncompatibleError
from arrag_runtime.format.neighborhood import MISSING, Neighborhood
from arrag_runtime.format.specs import KeySpec, key_spec, key_vectors, normalised


@given(
    neighbors=st.integers(1, 24),
    bits=st.integers(1, 16),
    count=st.integers(0, 5),
    missing=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_keys_are_the_bytes_of_one_integer(
    neighbors: int, bits: int, count: int, missing: bool, seed: int
) -> None:
    """The first neighbour's token in the lowest bits; "missing" is one more than the last token."""
    # The last token that fits, less one place for "missing".
    vocabulary = (1 << bits) - 1
    row = Neighborhood("row", tuple((0, -n) for n in range(1, neighbors + 1)), "zero")
    layout = CodeLayout(KeySpec(row), np.zeros((vocabulary, 1), np.float32))
    assert layout.bits == bits
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, vocabulary, (count, neighbors)).astype(np.uint16)
    if missing:
        keys[rng.random(keys.shape) < 0.3] = MISSING
    codes = layout.pack(keys)
    assert codes.shape == (count, layout.size)
    for key, code in zip(keys.tolist(), codes, strict=True):
        whole = 0
        for place, token in enumerate(key):
            whole |= (vocabulary if token == MISSING else token) << (place * bits)
        assert code.tobytes() == whole.to_bytes(-(-neighbors * bits // 8), "little")
    assert np.array_equal(layout.unpack(codes), keys)


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
    codes = np.zeros((vocabulary, 1), np.float32)
    assert CodeLayout(key_spec("causal-1", border, "codebook"), codes).bits == bits


def test_seven_bytes_a_key() -> None:
    """The released tokenizer's causal keys: four tokens of fourteen bits."""
    codes = np.zeros((16384, 8), np.float32)
    assert CodeLayout(key_spec("causal-1", "skip", "codebook"), codes).size == 7
    assert CodeLayout(key_spec("causal-1", "zero", "codebook"), codes).size == 8


def test_latent_keys_have_no_codes() -> None:
    latent = CodeLayout(key_spec("causal-1", "skip", "latent"), np.zeros((24, 8), np.float32))
    with pytest.raises(IncompatibleError, match=r"latent space .* --kind ivfpq"):
        _ = latent.bits


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
