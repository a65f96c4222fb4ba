"""A shard of pictures to token grids: the step that wants a GPU.

In: the shard's inputs in order. Out: `EncodedShard`: grids of the pictures that could be used, a
reject for every other. Threads decode ahead of the model, within a bounded window; batches are cut
at fixed boundaries and the last one is padded, so a shard's tokens never depend on the others.
Grids that come as such pass by the model, beside pictures or alone. Runs without Ray and Lance.
"""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from arrag_runtime.format.errors import ShardError
from arrag_runtime.format.ids import Ids, image_id
from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.specs import TokenizerSpec
from arrag_runtime.tokenizers import Encoded, Pixels, Tokenizer, Tokens
from schemas.records import GridRecord, ImageRecord, Reject, Shard
from schemas.tables import images_schema, is_held_out
from stages.encode.decode import DecodeSettings, UndecodableError, decode_image


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """How a shard is encoded."""

    batch_size: int = 1
    """Pictures per call of the model."""
    decode_threads: int = 2
    """Threads that decode ahead of the model."""
    latents: bool = False
    """Whether latents are wanted beside the tokens."""
    hold_out: float = 0.0
    """Share of the pictures that are held out, chosen by their hashes."""
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    """How pictures are decoded."""


@dataclass(frozen=True)
class EncodedImage:
    """What is known of a picture besides its grid."""

    record: ImageRecord | GridRecord
    """The picture as it came, without its bytes."""
    width: int
    """Width in pixels; 0, being unknown, where the picture came as its grid."""
    height: int
    """Height in pixels; 0, being unknown, where the picture came as its grid."""
    sha256: str
    """Hash of the picture's bytes, or of its grid's where it came as that."""
    held_out: bool
    """Whether the picture stays out of the patches."""


_Decoded = tuple[EncodedImage, Pixels] | Reject


@dataclass(frozen=True)
class EncodedShard:
    """A shard's grids, and a reject for every input that has none."""

    images: tuple[EncodedImage, ...]
    """The N pictures in the order of their rows."""
    tokens: Tokens
    """Their grids, uint16 [N, h, w]."""
    latents: npt.NDArray[np.float16] | None
    """Their latents, float16 [N, h, w, d], where they were asked for."""
    rejects: tuple[Reject, ...]
    """The other inputs in the order of their rows."""
    seconds: float
    """Wall time of the encoding."""
    agreement: float | None
    """Share of the first batch's ids that equal float32's, where it was measured."""

    @property
    def inputs(self) -> int:
        """Pictures and rejects together: every input is one of them."""
        return len(self.images) + len(self.rejects)

    @property
    def reasons(self) -> Counter[str]:
        """How many rejects there are of each reason."""
        return Counter(reject.reason for reject in self.rejects)

    def image_ids(self, shard: Shard) -> Ids:
        """The pictures' ids, int64 [N]."""
        return np.array([image_id(shard.id, i.record.row) for i in self.images], dtype=np.int64)

    def in_database(self) -> npt.NDArray[np.bool_]:
        """Which pictures have patches: those that are not held out."""
        return np.array([not image.held_out for image in self.images], dtype=bool)

    def images_table(self, spec: TokenizerSpec, shard: Shard) -> pa.Table:
        """The rows of the images table."""
        columns: dict[str, object] = {
            "image_id": self.image_ids(shard),
            "source": [shard.source] * len(self.images),
            "shard": [shard.id] * len(self.images),
            "width": [image.width for image in self.images],
            "height": [image.height for image in self.images],
            "sha256": [image.sha256 for image in self.images],
            "split": ["heldout" if image.held_out else "database" for image in self.images],
            "tokens": fixed_lists(self.tokens.reshape(len(self.images), spec.positions)),
        }
        for name in ("key", "url", "caption", "licence", "metadata"):
            columns[name] = [getattr(image.record, name) for image in self.images]
        if self.latents is not None:
            width = spec.positions * spec.dimension
            columns["latents"] = fixed_lists(self.latents.reshape(len(self.images), width))
        return pa.table(columns, schema=images_schema(spec, latents=self.latents is not None))


def encode_shard(
    tokenizer: Tokenizer,
    inputs: Iterable[ImageRecord | GridRecord | Reject],
    settings: EncodeSettings,
    *,
    measure_agreement: bool = False,
) -> EncodedShard:
    """Encode one shard. Nothing that is wrong with a single picture raises."""
    started = time.perf_counter()
    spec = tokenizer.spec
    images: list[EncodedImage] = []
    rejects: list[Reject] = []
    grids: list[GridRecord] = []
    batches: list[Encoded] = []
    agreement: float | None = None
    with ThreadPoolExecutor(1, "encode") as model:
        waiting: deque[Future[Encoded]] = deque()
        decoded = _decoded(inputs, settings, grids)
        for pixels in _batches(decoded, settings, images, rejects):
            if measure_agreement and agreement is None:
                agreement = tokenizer.agreement(pixels[: len(images)])
            waiting.append(model.submit(tokenizer.encode, pixels, latents=settings.latents))
            if len(waiting) > 1:
                batches.append(waiting.popleft().result())
        batches += [future.result() for future in waiting]
    shape = (0, spec.grid_height, spec.grid_width)
    tokens = [batch.tokens for batch in batches] or [np.empty(shape, np.uint16)]
    latents = [batch.latents for batch in batches if batch.latents is not None]
    if settings.latents and not latents:
        latents = [np.empty((*shape, spec.dimension), np.float16)]
    encoded = np.concatenate(tokens)[: len(images)]
    if grids:
        images, encoded = _with_grids(images, encoded, grids, spec, settings)
    return EncodedShard(
        images=tuple(images),
        tokens=encoded,
        latents=np.concatenate(latents)[: len(images)] if latents else None,
        rejects=tuple(sorted(rejects, key=lambda reject: reject.row)),
        seconds=time.perf_counter() - started,
        agreement=agreement,
    )


def _with_grids(
    images: list[EncodedImage],
    tokens: Tokens,
    grids: Sequence[GridRecord],
    spec: TokenizerSpec,
    settings: EncodeSettings,
) -> tuple[list[EncodedImage], Tokens]:
    """Pictures and grids together, in the order of their rows."""
    if settings.latents:
        raise ShardError("token grids bring no latents; latent key space needs the pictures")
    given = [np.frombuffer(item.grid, "<u2") for item in grids]
    if any(len(g) != spec.positions or int(g.max()) >= spec.vocabulary for g in given):
        raise ShardError(f"a token grid does not fit {spec.describe()}")
    for item in grids:
        sha256 = hashlib.sha256(item.grid).hexdigest()
        light = replace(item, grid=b"")
        images.append(EncodedImage(light, 0, 0, sha256, is_held_out(sha256, settings.hold_out)))
    stacked = [tokens, np.array(given, np.uint16).reshape(-1, *tokens.shape[1:])]
    order = np.argsort([image.record.row for image in images], kind="stable")
    return [images[index] for index in order], np.concatenate(stacked)[order]


def _decoded(
    inputs: Iterable[ImageRecord | GridRecord | Reject],
    settings: EncodeSettings,
    grids: list[GridRecord],
) -> Iterator[_Decoded]:
    """The pictures in order, decoded ahead by threads, and the rejects; grids go to `grids`."""
    window = settings.decode_threads + 2 * settings.batch_size
    ahead: deque[Future[_Decoded]] = deque()
    with ThreadPoolExecutor(settings.decode_threads, "decode") as threads:
        for item in inputs:
            if isinstance(item, GridRecord):
                grids.append(item)
            elif isinstance(item, Reject):
                yield item
            else:
                ahead.append(threads.submit(_decode_one, item, settings))
            if len(ahead) >= window:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _decode_one(record: ImageRecord, settings: EncodeSettings) -> _Decoded:
    try:
        done = decode_image(record.data, settings.decode, record.faces)
    except UndecodableError as error:
        return Reject(record.row, record.key, "decode", error.reason, error.detail, record.url)
    sha256 = hashlib.sha256(record.data).hexdigest()
    held_out = is_held_out(sha256, settings.hold_out)
    light = replace(record, data=b"")
    return EncodedImage(light, done.width, done.height, sha256, held_out), done.pixels


def _batches(
    decoded: Iterable[_Decoded],
    settings: EncodeSettings,
    images: list[EncodedImage],
    rejects: list[Reject],
) -> Iterator[Pixels]:
    """Batches uint8 [batch_size, size, size, 3], the last one padded with black pictures.

    What is known of their pictures goes to `images`.
    """
    size = settings.decode.size
    batch, filled = np.zeros((settings.batch_size, size, size, 3), np.uint8), 0
    for outcome in decoded:
        if isinstance(outcome, Reject):
            rejects.append(outcome)
            continue
        image, pixels = outcome
        images.append(image)
        batch[filled] = pixels
        filled += 1
        if filled == settings.batch_size:
            yield batch
            batch, filled = np.zeros_like(batch), 0
    if filled:
        yield batch
