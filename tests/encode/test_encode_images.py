"""Encoding a shard: every input answered for, in order, at fixed batch boundaries, bounded ahead."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from arrag_runtime.format.ids import image_id
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.specs import TokenizerSpec, key_spec
from arrag_runtime.tokenizers import Encoded, Tokenizer
from schemas.records import ImageRecord, Reject, Shard
from schemas.tables import images_schema, is_held_out
from stages.encode.decode import DecodeSettings, decode_image
from stages.encode.encode_images import EncodedShard, EncodeSettings, encode_shard
from stages.tables.committer import IMAGES, Committer, ShardResult, create_tables, write_fragments
from tests.conftest import encoded, jpeg, picture

SHARD = Shard("folder", "0123456789abcdef", ())
BROKEN = b"\xff\xd8\xff no jpeg"
Inputs = list[ImageRecord | Reject]


class Brightness:
    """A tokenizer of 2x2 tokens: the mean brightness of each quarter of a 32x32 picture."""

    spec = TokenizerSpec("brightness", 32, 2, 2, 256, 1, "centre crop", "0" * 64)
    weights: str | None = None
    precision = "float32"

    def __init__(self, pause: float = 0.0) -> None:
        self.batches: list[int] = []
        self.pause = pause

    def setup(self, device: str, *, precision: str | None = None, compile: bool = False) -> None:
        pass

    def encode(self, images: npt.NDArray[np.uint8], *, latents: bool = False) -> Encoded:
        time.sleep(self.pause)
        self.batches.append(len(images))
        quarters = images.reshape(len(images), 2, 16, 2, 16, 3).mean(axis=(2, 4, 5))
        vectors = (quarters[..., None] / 255).astype(np.float16) if latents else None
        return Encoded(quarters.astype(np.uint16), vectors)

    def agreement(self, images: npt.NDArray[np.uint8]) -> float:
        return 0.75

    def decode(self, tokens: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
        raise NotImplementedError

    def codebook(self) -> npt.NDArray[np.float32]:
        return np.ones((256, 1), np.float32)


def small(**changes: Any) -> EncodeSettings:
    return EncodeSettings(decode=DecodeSettings(size=32), **changes)


def mixed_inputs() -> Inputs:
    """Four pictures, two that do not decode and two that the source already rejected."""
    inputs: Inputs = [ImageRecord(n, f"p{n}", jpeg(n)) for n in range(8)]
    inputs[0] = Reject(0, "p0", "read", "missing", "gone")
    inputs[2] = ImageRecord(2, "p2", BROKEN, url="http://2")
    inputs[3] = ImageRecord(3, "p3", b"")
    inputs[5] = Reject(5, "p5", "read", "no-image", "txt")
    return inputs


def tokens_of(image: ImageRecord | Reject, tokenizer: Tokenizer, size: int) -> Any:
    assert isinstance(image, ImageRecord)
    prepared = decode_image(image.data, DecodeSettings(size=size)).pixels
    return tokenizer.encode(prepared[None]).tokens[0]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_input_is_a_picture_or_a_reject(batch_size: int, threads: int) -> None:
    """Both in the order of their rows, each picture with its own tokens, rejects with reasons."""
    inputs = mixed_inputs()
    done = encode_shard(Brightness(), inputs, small(batch_size=batch_size, decode_threads=threads))
    assert [image.record.row for image in done.images] == [1, 4, 6, 7]
    assert [(r.row, r.reason) for r in done.rejects] == [
        *((0, "missing"), (2, "not-an-image"), (3, "empty"), (5, "no-image"))
    ]
    assert [r.stage for r in done.rejects] == ["read", "decode", "decode", "read"]
    assert done.rejects[1].url == "http://2"
    assert done.inputs == 8
    assert sum(done.reasons.values()) == 4
    expected = [tokens_of(inputs[row], Brightness(), 32) for row in (1, 4, 6, 7)]
    assert np.array_equal(done.tokens, expected)
    assert done.latents is None


def test_batches_are_cut_at_fixed_boundaries() -> None:
    """Every call of the model has the full batch size; only the shard's pictures come back."""
    counting = Brightness()
    done = encode_shard(counting, mixed_inputs(), small(batch_size=3))
    assert counting.batches == [3, 3]
    assert done.tokens.shape == (4, 2, 2)


def test_padding_changes_no_token(tokenizer: Tokenizer) -> None:
    """A short last batch gives what the model gives for its pictures and black ones after them."""
    records = [ImageRecord(n, f"p{n}", jpeg(n)) for n in range(3)]
    done = encode_shard(tokenizer, records, EncodeSettings(batch_size=2))
    prepared = np.stack([decode_image(r.data, DecodeSettings()).pixels for r in records])
    padded = np.concatenate([prepared[2:], np.zeros_like(prepared[:1])])
    expected = np.concatenate([tokenizer.encode(b).tokens for b in (prepared[:2], padded)])[:3]
    assert np.array_equal(done.tokens, expected)
    assert (done.tokens[2] != tokenizer.encode(prepared[2:]).tokens[0]).mean() < 0.005
    assert done.agreement is None


def test_a_shard_encodes_the_same_way_every_time() -> None:
    """Threads and what else is in the shard do not matter to a picture's tokens."""
    inputs = mixed_inputs()
    first, again = (encode_shard(Brightness(), inputs, small(decode_threads=n)) for n in (1, 5))
    assert np.array_equal(first.tokens, again.tokens)
    assert (first.images, first.rejects) == (again.images, again.rejects)


def test_the_bytes_decide_what_is_held_out() -> None:
    """Hash, sides and split of each picture; its bytes are let go of."""
    inputs = [ImageRecord(n, f"p{n}", jpeg(n, 40 + n, 50)) for n in range(12)]
    done = encode_shard(Brightness(), inputs, small(hold_out=0.5))
    hashes = [hashlib.sha256(item.data).hexdigest() for item in inputs]
    assert [image.sha256 for image in done.images] == hashes
    held_out = [is_held_out(sha, 0.5) for sha in hashes]
    assert [image.held_out for image in done.images] == held_out
    assert done.in_database().tolist() == [not held for held in held_out]
    assert 0 < sum(held_out) < 12
    assert [(i.width, i.height) for i in done.images] == [(40 + n, 50) for n in range(12)]
    assert {getattr(image.record, "data", None) for image in done.images} == {b""}


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (1, 4, 6, 7)])
def test_the_images_table_holds_the_pictures(rows: Sequence[int], latents: bool) -> None:
    """One row per picture with its id, grid and what the source said; also where there is none."""
    inputs = [item for item in mixed_inputs() if item.row in rows]
    done = encode_shard(Brightness(), inputs, small(latents=latents, hold_out=0.4))
    table = done.images_table(Brightness.spec, SHARD)
    assert table.schema == images_schema(Brightness.spec, latents=latents)
    assert table["image_id"].to_pylist() == [image_id(SHARD.id, row) for row in rows]
    assert table["key"].to_pylist() == [f"p{row}" for row in rows]
    assert set(table["shard"].to_pylist()) <= {SHARD.id}
    assert np.array_equal(list_values(table["tokens"]), done.tokens.reshape(-1, 4))
    splits = ["heldout" if image.held_out else "database" for image in done.images]
    assert table["split"].to_pylist() == splits
    if latents:
        assert done.latents is not None
        assert np.array_equal(list_values(table["latents"]), done.latents.reshape(-1, 4))


def test_a_shard_without_inputs_is_done() -> None:
    """No input, no picture, no reject, no call of the model."""
    idle = Brightness()
    done = encode_shard(idle, iter(()), small())
    assert (done.inputs, done.tokens.shape, idle.batches) == (0, (0, 2, 2), [])


def test_a_shard_of_rejects_alone_is_done() -> None:
    """Nothing for the model, and every input is still accounted for."""
    inputs: Inputs = [ImageRecord(n, f"p{n}", BROKEN) for n in range(5)]
    done = encode_shard(Brightness(), inputs, small(latents=True, batch_size=2))
    assert (done.inputs, len(done.rejects), done.tokens.shape) == (5, 5, (0, 2, 2))
    assert done.latents is not None
    assert done.latents.shape == (0, 2, 2, 1)


def test_agreement_is_asked_below_float32() -> None:
    """In a lower precision the first batch is compared with float32."""
    half = Brightness()
    half.precision = "bfloat16"
    assert encode_shard(half, mixed_inputs(), small(), measure_agreement=True).agreement == 0.75


def test_a_failing_model_fails_the_shard() -> None:
    """What is wrong with the model is not turned into rejects of pictures."""

    class Failing(Brightness):
        def encode(self, images: npt.NDArray[np.uint8], *, latents: bool = False) -> Encoded:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        encode_shard(Failing(), mixed_inputs(), small())


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 2), (4, 3)])
def test_the_window_ahead_of_the_model_is_bounded(batch_size: int, threads: int) -> None:
    """Inputs are pulled a few batches ahead of a slow model, not the whole shard into memory."""
    pulled = 0
    ahead: list[int] = []
    data = jpeg(0)

    class Watching(Brightness):
        def encode(self, images: npt.NDArray[np.uint8], *, latents: bool = False) -> Encoded:
            found = super().encode(images, latents=latents)
            ahead.append(pulled - batch_size * (len(self.batches) - 1))
            return found

    def inputs() -> Iterator[ImageRecord]:
        nonlocal pulled
        for row in range(120):
            pulled += 1
            yield ImageRecord(row, f"p{row}", data)

    settings = small(batch_size=batch_size, decode_threads=threads)
    done = encode_shard(Watching(pause=0.01), inputs(), settings)
    assert len(done.images) == 120
    assert max(ahead) <= threads + 6 * batch_size


def test_pictures_come_back_from_the_table(tmp_path: Path) -> None:
    """What is written is found again by id, by hash and by split."""
    layout, keys = Layout(tmp_path), key_spec("causal-1", "zero", "codebook")
    create_tables(layout, Brightness.spec, keys)
    records = [
        ImageRecord(n, f"p{n}", encoded(picture(n), "PNG"), caption=f"c{n}", url=f"http://{n}")
        for n in range(9)
    ]
    done = encode_shard(Brightness(), records, small(hold_out=0.5))
    commit_images(layout, done, keys)
    table = ImageTable(layout.images)
    ids = done.image_ids(SHARD)
    assert table.count == 9
    assert table.rows([]) == {}
    assert table.rows([12345]) == {}
    chosen = table.rows([int(ids[3]), int(ids[1])])
    assert {row.caption for row in chosen.values()} == {"c1", "c3"}
    assert chosen[int(ids[3])].sha256 == done.images[3].sha256
    assert np.array_equal(table.grids([int(ids[2])], 2)[int(ids[2])], done.tokens[2])
    for split, inside in (("database", done.in_database()), ("heldout", ~done.in_database())):
        found, grids = table.sample(split, 100, seed=0)
        assert np.array_equal(found, ids[inside])
        assert np.array_equal(grids, done.tokens[inside].reshape(-1, 4))
        few, _ = table.sample(split, 2, seed=0)
        assert set(few.tolist()) < set(found.tolist())
    none, _ = table.sample("nothing", 5, seed=0)
    assert len(none) == 0


def commit_images(layout: Layout, done: EncodedShard, keys: Any) -> None:
    """Make the shard's pictures visible."""
    fragments = write_fragments(layout.images, done.images_table(Brightness.spec, SHARD))
    committer = Committer(layout, keys)
    committer.plan([SHARD])
    count = len(done.images)
    counts = (SHARD.id, SHARD.source, 1, count, count, 0, 0)
    committer.commit(ShardResult(*counts, {}, {IMAGES: fragments}))
