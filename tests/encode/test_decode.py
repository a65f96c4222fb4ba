"""Bytes to pixels: hostile files end in one kind of error, good ones in the released geometry."""

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from arrag_runtime.tokenizers.preparation import prepare
from schemas.records import REASONS
from stages.encode.decode import Decoded, DecodeSettings, UndecodableError, decode_image
from tests.conftest import encoded, jpeg, picture

SMALL = DecodeSettings(size=64, max_pixels=1_000_000)
TIGHT = DecodeSettings(size=16, max_pixels=2_000, min_side=4)
ORIENTATION = 0x0112
# Pillow warns of damaged tags and of many pixels; both are what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def reason(data: bytes, settings: DecodeSettings = DecodeSettings()) -> str:  # noqa: B008
    """Why these bytes are refused; the reason is one that reports know, with a detail."""
    with pytest.raises(UndecodableError) as caught:
        decode_image(data, settings)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    return caught.value.reason


def flat(data: bytes) -> tuple[int, ...]:
    """The one colour of a picture of one colour."""
    found = decode_image(data, SMALL).pixels.reshape(-1, 3)
    assert (found == found[0]).all()
    return tuple(found[0].tolist())


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims these sides and holds no pixel at all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def gif_header(screen: int, frame: int) -> bytes:
    """A GIF whose frame claims another size than its screen, without pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x00;"


def jpeg_header(side: int) -> bytes:
    """A small JPEG whose frame header claims a square of this side, and which never ends."""
    data = bytearray(jpeg(0))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data[:-2])


# The stored pixels from which a viewer makes the upright ones, by EXIF orientation.
STORED: dict[int, Any] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_a_turned_picture_equals_the_upright_one(
    kind: str, options: dict[str, Any], orientation: int
) -> None:
    """All eight EXIF orientations give the pixels and the sides of the upright picture."""
    upright = np.asarray(picture(1, 90, 50))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    turned = decode_image(encoded(stored, kind, exif=exif, **options), SMALL)
    plain = decode_image(encoded(Image.fromarray(upright), "PNG"), SMALL)
    assert (turned.width, turned.height) == (90, 50)
    assert np.array_equal(turned.pixels, plain.pixels)


def test_cmyk_pictures_become_rgb() -> None:
    """Ink values turn into colours; Adobe's inverted JPEGs too."""
    inks = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    assert flat(encoded(inks, "TIFF")) == (255, 0, 0)
    assert np.abs(np.subtract(flat(encoded(inks, "JPEG", quality=95)), (255, 0, 0))).max() < 6


@pytest.mark.parametrize(
    ("value", "grey"), [(0x00FF, 0), (0x0100, 1), (0x8040, 0x80), (0xFFFF, 255)]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_upper_byte(kind: str, value: int, grey: int) -> None:
    """16-bit pictures are scaled to 8 bits, not clipped."""
    image = Image.fromarray(np.full((40, 40), value, np.uint16))
    assert flat(encoded(image, kind)) == (grey, grey, grey)


def test_transparency_is_laid_on_white() -> None:
    """LA, RGBA, and colours of a palette, a grey or an RGB value that count as transparent."""
    assert flat(encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert flat(encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 51)), "PNG")) == (255, 204, 204)
    assert flat(encoded(Image.new("LA", (40, 40), (0, 204)), "PNG")) == (51, 51, 51)
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert flat(encoded(palette, "PNG")) == (40, 50, 60)
    assert flat(encoded(palette, "PNG", transparency=0)) == (40, 50, 60)
    assert flat(encoded(palette, "PNG", transparency=1)) == (255, 255, 255)
    assert flat(encoded(palette, "PNG", transparency=b"\xff\x33")) == (212, 214, 216)
    assert flat(encoded(palette, "GIF", transparency=1)) == (255, 255, 255)
    assert flat(encoded(Image.new("L", (40, 40), 7), "PNG", transparency=7)) == (255, 255, 255)
    rgb = Image.new("RGB", (40, 40), (1, 2, 3))
    assert flat(encoded(rgb, "PNG", transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    """Animations, page stacks and cameras' multi-picture JPEGs give their first picture."""
    first, second = (Image.new("RGB", (40, 40), c) for c in ((255, 0, 0), (0, 0, 255)))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **lossless)
    assert np.abs(np.subtract(flat(data), (255, 0, 0))).max() <= 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"<html><body>404 Not Found</body></html>", "not-an-image"),
        (b"%PDF-1.7 \n", "not-an-image"),
        (jpeg(0)[: len(jpeg(0)) // 2], "truncated"),
        (encoded(picture(0), "PNG")[:400], "truncated"),
        (encoded(picture(0), "WEBP")[:400], "truncated"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "too-small"),
        (encoded(Image.new("RGB", (31, 400)), "PNG"), "too-small"),
        (encoded(Image.new("1", (20000, 32)), "PNG"), "too-elongated"),
        (encoded(Image.new("1", (32, 20000)), "PNG"), "too-elongated"),
        (encoded(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"), "unsupported-mode"),
    ],
)
def test_a_picture_that_cannot_be_used_says_why(data: bytes, expected: str) -> None:
    """Each kind of unusable file has its own reason."""
    assert reason(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        *(png_header(60000, 60000), png_header(10000, 9000), jpeg_header(60000)),
        *(jpeg_header(9400), gif_header(40, 60000), gif_header(40, 9200)),
    ],
    ids=["png", "png-below-pillows-own-limit", "jpeg", "jpeg-below", "gif", "gif-below"],
)
def test_too_many_pixels_are_refused_before_any_is_decoded(data: bytes) -> None:
    """These files hold no such pixels, so an attempt to decode them would say "truncated"."""
    assert len(data) < 5000
    assert reason(data) == "too-many-pixels"


@pytest.mark.parametrize("data", [png_header(100, 100), jpeg_header(2000), gif_header(40, 100)])
def test_the_same_files_within_the_limit_fail_in_decoding(data: bytes) -> None:
    """What the test above relies on."""
    assert reason(data) == "truncated"


def test_a_limit_above_pillows_own_is_honoured() -> None:
    """A picture within `max_pixels` gets as far as decoding, whatever Pillow's default limit."""
    data = png_header(14000, 14000, depth=1, colour=0)
    assert reason(data, DecodeSettings(max_pixels=200_000_000)) == "truncated"


@given(st.integers(1, 130), st.integers(1, 130))
def test_limits_are_exact(width: int, height: int) -> None:
    """Pixels, shorter side and resized pixels are each allowed up to the limit and no further."""
    data = encoded(Image.new("L", (width, height)), "BMP")
    short, long = sorted((width, height))
    if width * height > 2000:
        assert reason(data, TIGHT) == "too-many-pixels"
    elif short < 4:
        assert reason(data, TIGHT) == "too-small"
    elif 16 * 16 * long // short > 2000:
        assert reason(data, TIGHT) == "too-elongated"
    else:
        done = decode_image(data, TIGHT)
        assert (done.width, done.height, done.pixels.shape) == (width, height, (16, 16, 3))


def resize_then_crop(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """torchvision's Resize(size) and CenterCrop(size) on a PIL picture, after its documentation."""
    width, height = image.size
    if width < height:
        resized = image.resize((size, int(size * height / width)), Image.Resampling.BILINEAR)
    else:
        resized = image.resize((int(size * width / height), size), Image.Resampling.BILINEAR)
    top = int(round((resized.height - size) / 2.0))  # noqa: RUF046
    left = int(round((resized.width - size) / 2.0))  # noqa: RUF046
    return np.asarray(resized)[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *((384, 384), (500, 333), (333, 500), (427, 641), (97, 32), (1000, 999)),
        *((385, 384), (384, 387), (769, 770), (33, 401)),
    ],
)
def test_geometry_is_torchvisions(width: int, height: int) -> None:
    """Shorter side to 384 with antialiasing, centre crop; lossless files, odd sides, both ways."""
    image = picture(2, width, height)
    done = decode_image(encoded(image, "PNG"), DecodeSettings())
    assert np.array_equal(done.pixels, resize_then_crop(image, 384))
    assert (done.width, done.height) == (width, height)


@pytest.mark.parametrize(("side", "left"), [(384, 0), (385, 0), (386, 1), (387, 2), (389, 2)])
def test_the_crop_rounds_half_to_even(side: int, left: int) -> None:
    """Where nothing is resized the crop is an exact copy: 385 wide starts at 0, 387 wide at 2."""
    wide = picture(3, side, 384)
    kept = np.asarray(wide)[:, left : left + 384]
    assert np.array_equal(np.asarray(prepare(wide, 384)), kept)
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(np.asarray(prepare(tall, 384)), kept.transpose(1, 0, 2))


def test_shrinking_is_antialiased() -> None:
    """A fine checkerboard becomes even grey; without antialiasing it would stay black and white."""
    board = (np.indices((1536, 1536)).sum(axis=0) % 2 * 255).astype(np.uint8)
    shrunk = decode_image(encoded(Image.fromarray(board), "PNG"), DecodeSettings()).pixels
    assert shrunk.min() > 110
    assert shrunk.max() < 145


KINDS: list[tuple[str, dict[str, Any]]] = [
    *(("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})),
    *(("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {}), ("PPM", {}), ("AVIF", {})),
    ("TIFF", {"compression": "tiff_lzw"}),
]
VALID = [encoded(picture(4, 48, 40), kind, **options) for kind, options in KINDS]


def outcome(data: bytes) -> str | Decoded:
    """The pixels, or the reason of the only error that decoding may end in."""
    try:
        return decode_image(data, SMALL)
    except UndecodableError as error:
        return error.reason


def check_outcome(found: str | Decoded) -> None:
    """Pixels of the right kind, or a reason that reports know."""
    if isinstance(found, Decoded):
        assert found.pixels.shape == (64, 64, 3)
        assert found.pixels.dtype == np.uint8
    else:
        assert found in REASONS


@given(st.sampled_from([b"", *(data[:12] for data in VALID)]), st.binary(max_size=200))
def test_random_bytes_never_escape(magic: bytes, rest: bytes) -> None:
    """Bytes that only begin like a picture, or not even that."""
    assume(magic or rest)
    check_outcome(outcome(magic + rest))


@pytest.mark.parametrize("data", VALID)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=8)
)
def test_damaged_pictures_never_escape(data: bytes, flips: list[tuple[int, int]]) -> None:
    """A picture of each format with a few bytes changed anywhere, mostly near its header."""
    damaged = bytearray(data)
    for number, (at, change) in enumerate(flips):
        damaged[at % (len(data) if number % 2 else min(len(data), 120))] ^= change
    check_outcome(outcome(bytes(damaged)))


def test_what_the_fuzz_starts_from_is_sound() -> None:
    """Undamaged, every picture of the fuzz decodes."""
    assert all(isinstance(outcome(data), Decoded) for data in VALID)
