"""Bytes to pixels: hostile input ends here.

In: the bytes of a picture as it came. Out: uint8 RGB [size, size, 3], prepared the way AR-RAG's
released code does (torchvision's Resize and CenterCrop on a PIL image): shorter side to `size`
with antialiased bilinear resampling, then a centre crop. Colour profiles are ignored, as there.
Sizes are checked from the header, before any pixel is decoded. Faces are blurred on the original,
before resizing, by the method of DataComp's own tool (img2dataset's BoundingBoxBlurrer, after Yang
et al., arXiv 2103.06191): each box grows by a tenth of its longer side; one Gaussian whose sigma is
a tenth of the longest side of all boxes blurs the picture and, as soft edges, the mask of the
boxes. That tool reads pictures as they are stored, without turning them upright as EXIF asks, so
the boxes are those of the stored picture.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

from arrag_runtime.tokenizers import Pixels
from arrag_runtime.tokenizers.preparation import prepare
from schemas.records import Box

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that may be parsed; Pillow's rarer parsers stay closed to bytes from outside."""
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a stored picture becomes upright, by the value of its EXIF orientation."""
_FACE_MARGIN = _FACE_SIGMA = 0.1
"""By how much a face's box grows, and the blur's sigma, as shares of its longer side."""


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What a picture becomes, and which ones are refused."""

    size: int = 384
    """Side of the result in pixels."""
    max_pixels: int = 80_000_000
    """Pixels that a picture may have, before and after resizing."""
    min_side: int = 32
    """Pixels that the shorter side must have at least."""


@dataclass(frozen=True)
class Decoded:
    """A picture as the tokenizer takes it."""

    pixels: Pixels
    """uint8 RGB [size, size, 3]."""
    width: int
    """Width of the upright original in pixels."""
    height: int
    """Height of the upright original in pixels."""


class UndecodableError(Exception):
    """A picture cannot be used. `reason` is one of `schemas.records.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode_image(data: bytes, settings: DecodeSettings, faces: Sequence[Box] = ()) -> Decoded:
    """Decode and prepare one picture. Raises UndecodableError, and nothing else.

    faces: rectangles of the picture as it is stored, to be blurred, as shares of its sides.
    """
    Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is the limit, also where it allows more.
    if not data:
        raise UndecodableError("empty", "the file has zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _require_size(image.width, image.height, settings)
            image.seek(0)
            if faces:
                turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
                hidden = blur_faces(_to_rgb(image), faces)
                rgb = hidden if turn is None else hidden.transpose(turn)
            else:
                rgb = _to_rgb(ImageOps.exif_transpose(image))
    except UndecodableError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError("not-an-image", f"begins with {data[:16]!r}") from error
    except MemoryError as error:
        raise UndecodableError("too-many-pixels", "out of memory while decoding") from error
    # A damaged file makes Pillow's parsers raise nearly anything: the picture is lost, not the build.
    except Exception as error:
        raise UndecodableError("truncated", f"{type(error).__name__}: {error}") from error
    return Decoded(np.asarray(prepare(rgb, settings.size)), rgb.width, rgb.height)


def _require_size(width: int, height: int, settings: DecodeSettings) -> None:
    if width * height > settings.max_pixels:
        limit = settings.max_pixels
        raise UndecodableError("too-many-pixels", f"{width}x{height} is over {limit} pixels")
    short, long = sorted((width, height))
    if short < settings.min_side:
        raise UndecodableError("too-small", f"{width}x{height}, minimum side {settings.min_side}")
    if settings.size * settings.size * long // short > settings.max_pixels:
        raise UndecodableError("too-elongated", f"{width}x{height}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: 16-bit greys scaled to 8, transparency laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UndecodableError("unsupported-mode", "32-bit float pixels have no agreed range")
    if image.mode == "LAB":
        raise UndecodableError("unsupported-mode", "LAB pixels need a colour profile")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def blur_faces(rgb: Image.Image, faces: Sequence[Box]) -> Image.Image:
    """An RGB picture with these boxes blurred beyond recognition; see the module."""
    width, height = rgb.size
    mask = Image.new("L", rgb.size, 0)
    draw = ImageDraw.Draw(mask)
    longest = 0
    for box in faces:
        x0, x1 = sorted(int(min(max(side, 0.0), 1.0) * width) for side in box[::2])
        y0, y1 = sorted(int(min(max(side, 0.0), 1.0) * height) for side in box[1::2])
        side = max(x1 - x0, y1 - y0)
        longest = max(longest, side)
        margin = _FACE_MARGIN * side
        left, top = max(int(x0 - margin), 0), max(int(y0 - margin), 0)
        right, bottom = min(int(x1 + margin), width - 1), min(int(y1 + margin), height - 1)
        # Pillow draws the far edges too, numpy's slices in the original leave them out.
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=255)
    if longest == 0:
        return rgb
    soft = ImageFilter.GaussianBlur(_FACE_SIGMA * longest)
    return Image.composite(rgb.filter(soft), rgb, mask.filter(soft))
