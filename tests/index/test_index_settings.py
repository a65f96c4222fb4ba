"""Settings of indexes: what follows from the keys, and what is refused before anything is built."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.specs import key_spec
from schemas.settings.index import (
    FEWEST_POINTS,
    FLAT_UP_TO,
    IndexSettings,
    choose_lists,
    size_in_bytes,
)

TOKENS = key_spec("causal-1", "skip", "codebook")
LATENTS = key_spec("causal-1", "skip", "latent")


@pytest.mark.parametrize(
    ("settings", "keys", "count", "kind"),
    [
        ({}, TOKENS, 10, "codebook"),
        ({}, TOKENS, 10**9, "codebook"),
        ({}, LATENTS, FLAT_UP_TO, "flat"),
        ({}, LATENTS, FLAT_UP_TO + 1, "ivfpq"),
        ({"index_key": "IVF4,Flat"}, TOKENS, 10, "ivfpq"),
        ({"kind": "flat"}, TOKENS, 10**9, "flat"),
    ],
)
def test_the_kind_follows_from_the_keys(
    settings: dict[str, Any], keys: Any, count: int, kind: str
) -> None:
    """And nothing else changes; what is kept comes back."""
    resolved = IndexSettings(**settings).resolved(keys, count)
    assert resolved == IndexSettings(**settings | {"kind": kind})
    assert IndexSettings.from_json(resolved.to_json() | {"rows": 7}) == resolved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hnsw"}, "'hnsw'.*codebook, ivfpq, flat"),
        ({"kind": "flat", "memory": "much"}, "--memory 'much'"),
        ({"worker_memory": "-1GB"}, "--worker-memory '-1GB'"),
        ({"kind": "flat", "index_key": "Flat"}, "--index-key is for --kind ivfpq, not flat"),
        ({"index_key": "IVF4,Flat", "lists": 4}, "--lists is for --kind codebook, not ivfpq"),
        ({"kind": "flat", "weights": "1,1,1,1"}, "--weights is for --kind codebook"),
        ({"kind": "ivfpq", "dedup": "images"}, "--dedup is for --kind codebook"),
        ({"kind": "flat", "nprobe": 3}, "--nprobe is for kinds with lists"),
        ({"dedup": "all"}, "unknown --dedup 'all'; choose one of none, images"),
        ({"max_copies": 0}, "--max-copies is 0; give 1 or more"),
        ({"weights": "heavy"}, "'heavy'.*4 numbers.*causal-1.*1,1,1,1"),
        ({"weights": "1,2,3"}, "'1,2,3'.*4 numbers"),
        ({"weights": "1,-1,1,1"}, "4 numbers"),
        ({"weights": "0,0,0,0"}, "4 numbers"),
        ({"weights": "1,nan,1,1"}, "4 numbers"),
        ({"weights": "1,inf,1,1"}, "4 numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        IndexSettings(**settings).resolved(TOKENS, 100)
    assert "\n" not in str(caught.value)


def test_codes_need_tokens() -> None:
    with pytest.raises(BadInputError, match=r"latent space.*--kind ivfpq"):
        IndexSettings(kind="codebook").resolved(LATENTS, 100)


def test_typed_weights_have_a_mean_of_one() -> None:
    typed = replace(IndexSettings(), weights="1,3,0,4")
    assert typed.typed_weights(TOKENS) == (0.5, 1.5, 0.0, 2.0)
    for none in ("equal", "learned"):
        assert replace(typed, weights=none).typed_weights(TOKENS) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512mb", 512 * 10**6), ("1.5G", 1_500_000_000), (" 7 ", 7)],
)
def test_sizes_as_typed(text: str, size: int) -> None:
    assert size_in_bytes("--memory", text) == size


@given(keys=st.integers(1, 10**10), query_ms=st.floats(0.05, 20))
def test_lists_grow_with_the_keys(keys: int, query_ms: float) -> None:
    """Never fewer for more keys or less time; enough points for each; at most a million."""
    lists = choose_lists(keys, query_ms)
    assert 1 <= lists <= 1 << 20
    assert lists == 1 or lists * FEWEST_POINTS <= keys
    assert choose_lists(2 * keys, query_ms) >= lists
    assert choose_lists(keys, query_ms / 2) >= lists
