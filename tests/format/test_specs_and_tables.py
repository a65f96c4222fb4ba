"""Specifications, ids, schemas and manifests: the arithmetic and formats everything relies on."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.ids import (
    image_id,
    patch_ids,
    require_grid_fits,
    shard_number,
    split_patch_ids,
)
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.manifest import (
    DatabaseManifest,
    EncoderSettings,
    IndexManifest,
    Layout,
    read_codebook,
    write_codebook,
)
from arrag_runtime.format.neighborhood import BORDERS, MISSING, NEIGHBORHOODS
from arrag_runtime.format.specs import (
    KEY_SPACES,
    KeySpec,
    TokenizerSpec,
    key_spec,
    key_vectors,
    normalised,
    require_same_tokenizer,
)
from schemas.records import ImageRecord, Reject, pack_records, unpack_records
from schemas.tables import is_held_out, patches_schema
from stages.encode.extract_patches import extract_patches

SPEC = TokenizerSpec("toy", 96, 6, 5, 50, 3, "centre crop", "0" * 64)
CODES = normalised(np.random.default_rng(0).normal(size=(50, 3)))
KEY_SPECS = [key_spec(n, b, s) for n in NEIGHBORHOODS for b in BORDERS for s in KEY_SPACES]
MANIFEST = DatabaseManifest(
    SPEC,
    "weights.pt",
    EncoderSettings("cpu", "float32", 1),
    key_spec("causal-2", "zero", "latent"),
    0.1,
    ("folder", "sample"),
    ({"seconds": 1.5, "input": ["a"]},),
)
INDEX = IndexManifest(
    name="mine",
    kind="codebook",
    index_key="IVF9,PQ8x14",
    keys=key_spec("surround-1", "skip", "codebook"),
    table_version=3,
    mark=2,
    count=17,
    entries=15,
    nprobe=4,
    code_bytes_per_key=6.2,
    resident_bytes_per_key=7.9,
    ms_per_query=0.5,
    recall_at_10=0.98,
    certificate={"queries": 10},
    left_out=1,
    parts=("part-0000", "part-0002"),
    weights=(0.5, 1.5),
    temperature=0.6,
    settings={"memory": "4GB"},
    metrics={"reconstruction": 0.1},
)
shard_ids = st.integers(0, 2**64 - 1).map(lambda number: f"{number:016x}")
rows = st.integers(0, 2**14 - 1)
places = st.integers(0, 2**10 - 1)


@given(st.lists(st.lists(st.sampled_from([*range(50), MISSING]), min_size=4, max_size=4)))
def test_key_vectors_equal_a_loop(keys: list[list[int]]) -> None:
    """Every token becomes its codebook row, a missing one zeros, side by side."""
    expected = []
    for key in keys:
        row: list[float] = []
        for token in key:
            row += [0.0] * 3 if token == MISSING else CODES[token].tolist()
        expected.append(row)
    vectors = key_vectors(np.array(keys, np.uint16).reshape(-1, 4), CODES)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, np.array(expected, np.float32).reshape(-1, 12))


def test_key_vectors_refuse_a_token_outside_the_codebook() -> None:
    """The message names the token and the range; latents are only cast."""
    with pytest.raises(BadInputError, match=r"token 50 .* 0\.\.49"):
        key_vectors(np.array([[1, 2, 50, MISSING]], np.uint16), CODES)
    latents = np.array([[0.25, 60000.0]], np.float16)
    assert np.array_equal(key_vectors(latents, CODES), latents.astype(np.float32))
    assert key_vectors(latents, CODES).dtype == np.float32


def test_normalised_rows_have_length_one() -> None:
    """Directions stay, a zero row stays finite."""
    raw = np.array([[3.0, 4.0], [-1e-3, 0.0], [0.0, 0.0]])
    assert np.allclose(normalised(raw), [[0.6, 0.8], [-1.0, 0.0], [0.0, 0.0]])
    assert normalised(raw).dtype == np.float32


def test_the_same_tokenizer_in_another_file_is_accepted() -> None:
    """Neither the file's hash nor float16 rounding of the codebook makes another tokenizer."""
    other = replace(SPEC, weights_sha256="f" * 64)
    require_same_tokenizer(SPEC, CODES, other, normalised(CODES.astype(np.float16)))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"preparation": "stretched"},
        {"grid_width": 6},
        {"vocabulary": 51},
        {"dimension": 4},
        {"image_size": 97},
    ],
)
def test_another_tokenizer_is_refused_with_both_named(change: dict[str, Any]) -> None:
    """Whatever tokens depend on is compared before any codebook is."""
    want = replace(SPEC, **change)
    codes = np.ones((want.vocabulary, want.dimension), np.float32)
    with pytest.raises(IncompatibleError) as caught:
        require_same_tokenizer(SPEC, CODES, want, codes)
    assert SPEC.describe() in str(caught.value)
    assert want.describe() in str(caught.value)


@pytest.mark.parametrize(("cosine", "same"), [(0.9995, True), (0.9985, False), (-1.0, False)])
def test_one_row_that_turned_makes_another_codebook(cosine: float, same: bool) -> None:
    """Every row's cosine must reach 0.999; one that does not is refused with its value."""
    row = CODES[7].astype(np.float64)
    aside = np.cross(row, [0.0, 0.0, 1.0])
    aside /= np.linalg.norm(aside)
    turned = CODES.copy()
    turned[7] = cosine * row + np.sqrt(1 - cosine**2) * aside
    if same:
        require_same_tokenizer(SPEC, CODES, SPEC, turned)
    else:
        with pytest.raises(IncompatibleError, match=rf"{cosine:.4f}.*0\.999"):
            require_same_tokenizer(SPEC, CODES, SPEC, turned)


@given(shard_ids, rows, places)
@example("f" * 16, 2**14 - 1, 2**10 - 1)
@example("0" * 16, 0, 0)
@example("0" * 16, 2**14 - 1, 0)
@example("f" * 16, 0, 2**10 - 1)
def test_a_patch_id_tells_shard_row_and_position(shard: str, row: int, place: int) -> None:
    """39 + 14 + 10 bits of a positive int64, and back by arithmetic."""
    number = shard_number(shard)
    assert 0 <= number < 2**39
    assert number == int(shard, 16) // 2**25
    image = image_id(shard, row)
    (patch,) = patch_ids(np.array([image]), np.array([place]))[0].tolist()
    assert patch == (number * 2**14 + row) * 2**10 + place
    assert 0 <= patch < 2**63
    images, positions = split_patch_ids(np.array([patch]))
    assert (images.tolist(), positions.tolist()) == ([image], [place])
    assert divmod(image, 2**14) == (shard_number(shard), row)


def test_a_grid_that_patch_ids_cannot_hold_is_refused() -> None:
    """1,024 positions fit; one row more does not, and the message says why."""
    require_grid_fits(replace(SPEC, grid_height=32, grid_width=32))
    with pytest.raises(BadInputError, match=r"1056 positions.*1024.*10 bits.*32x32"):
        require_grid_fits(replace(SPEC, grid_height=33, grid_width=32))


def test_the_held_out_share_is_decided_by_the_bytes() -> None:
    """About the share asked for, the same on every call, and nested in any larger share."""
    hashes = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(4000)]
    tenth = {h for h in hashes if is_held_out(h, 0.1)}
    third = {h for h in hashes if is_held_out(h, 0.3)}
    assert abs(len(tenth) - 400) < 80
    assert abs(len(third) - 1200) < 120
    assert tenth < third
    assert tenth == {h for h in hashes if is_held_out(h, 0.1)}
    assert not any(is_held_out(h, 0.0) for h in hashes)
    assert all(is_held_out(h, 1.0) for h in hashes)


@pytest.mark.parametrize("keys", KEY_SPECS, ids=lambda keys: keys.name)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_extracted_patches_equal_a_loop(keys: KeySpec, count: int) -> None:
    """A row a position with a key: its id, its neighbours, its own token; none without pictures."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 50, (count, 6, 5)).astype(np.uint16)
    latents = rng.normal(size=(count, 6, 5, 3)).astype(np.float16)
    ids = np.array([image_id("ab" * 8, 5 * n) for n in range(count)], np.int64)
    in_latents = keys.space == "latent"
    table = extract_patches(SPEC, keys, ids, tokens, latents if in_latents else None)
    expected: list[tuple[int, list[float], int]] = []
    for n in range(count):
        for row, col in np.ndindex(6, 5):
            key: list[float] = []
            absent = 0
            for down, right in keys.neighborhood.offsets:
                inside = 0 <= row + down < 6 and 0 <= col + right < 5
                absent += not inside
                at = (n, row + down, col + right)
                if in_latents:
                    key += latents[at].tolist() if inside else [0.0] * 3
                else:
                    key.append(int(tokens[at]) if inside else MISSING)
            if not absent or keys.neighborhood.border == "zero":
                patch = int(ids[n]) * 1024 + row * 5 + col
                expected.append((patch, key, int(tokens[n, row, col])))
    assert table.schema == patches_schema(SPEC, keys)
    found = list(
        zip(
            table["patch_id"].to_pylist(),
            list_values(table["key"]).tolist(),
            table["next_token"].to_pylist(),
            strict=True,
        )
    )
    assert found == expected


def test_latent_keys_without_latents_are_refused() -> None:
    """The message says what is missing."""
    with pytest.raises(BadInputError, match="latents"):
        extract_patches(
            SPEC,
            key_spec("causal-1", "skip", "latent"),
            np.zeros(1, np.int64),
            np.zeros((1, 6, 5), np.uint16),
        )


def test_manifests_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Nothing is lost on the way, and no temporary file stays."""
    layout = Layout(tmp_path)
    MANIFEST.write(layout)
    assert DatabaseManifest.read(layout) == MANIFEST
    (tmp_path / "index" / "flat").mkdir(parents=True)
    INDEX.write(layout.index("flat"))
    assert IndexManifest.read(layout.index("flat")) == INDEX
    write_codebook(layout, CODES)
    assert np.array_equal(read_codebook(layout), CODES)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "codebook.npy"}


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"format": 1', b"\xff\xfe", b"[]", b"{}", b'{"format": 2}', b'{"format": 1}'],
)
def test_a_manifest_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, content: bytes | None
) -> None:
    """Missing, damaged, of another format or without its fields: one line with the folder."""
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    for read in (
        lambda: DatabaseManifest.read(Layout(tmp_path)),
        lambda: IndexManifest.read(tmp_path),
    ):
        with pytest.raises(ArragError) as caught:
            read()
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x93NUMPY\x01\x00"])
def test_a_codebook_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, content: bytes | None
) -> None:
    """Missing or damaged: one line that names the file."""
    if content is not None:
        (tmp_path / "codebook.npy").write_bytes(content)
    with pytest.raises(ArragError, match=r"codebook\.npy") as caught:
        read_codebook(Layout(tmp_path))
    assert "\n" not in str(caught.value)


def test_unknown_key_specs_are_refused() -> None:
    """A manifest or a user that names an unknown key space gets the choices; known ones return."""
    for keys in KEY_SPECS:
        assert KeySpec.from_json(keys.to_json()) == keys
    assert len({keys.name for keys in KEY_SPECS}) == len(KEY_SPECS)
    with pytest.raises(BadInputError, match=r"'pixels'.*codebook, latent"):
        key_spec("causal-1", "skip", "pixels")


optional = st.none() | st.text(st.characters(codec="utf-8"), max_size=5)
images = st.builds(
    ImageRecord, rows, st.just("k"), st.binary(), optional, optional, optional, optional
)
rejects = st.builds(
    Reject, rows, st.just("k"), st.just("read"), st.just("missing"), st.just("d"), optional
)


@given(st.lists(images | rejects, max_size=6))
def test_packed_records_come_back(items: list[ImageRecord | Reject]) -> None:
    """Pictures (even of zero bytes) and rejects keep their order and every field."""
    assert list(unpack_records(pack_records(items))) == items
