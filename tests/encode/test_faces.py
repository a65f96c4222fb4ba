"""Faces are blurred before a picture is used, and nothing else of it is touched."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from schemas.records import Box, ImageRecord
from stages.encode.decode import DecodeSettings, blur_faces, decode_image
from stages.encode.encode_images import encode_shard
from tests.conftest import encoded
from tests.encode.test_encode_images import Brightness, small

FACE: Box = (0.25, 0.25, 0.5, 0.5)


def checkered(width: int = 160, height: int = 160) -> Image.Image:
    """Black and white squares of four pixels, which any blur greys."""
    y, x = np.mgrid[0:height, 0:width] // 4
    return Image.fromarray(np.where((x + y) % 2, 255, 0).astype(np.uint8)).convert("RGB")


def contrast(image: Image.Image, box: Sequence[float]) -> float:
    """How far pixels within a box (shares of the sides) lie from their mean."""
    width, height = image.size
    x0, y0, x1, y1 = (int(side * size) for side, size in zip(box, (width, height) * 2, strict=True))
    return float(np.asarray(image, dtype=float)[y0:y1, x0:x1].std())


def test_a_face_is_blurred_and_the_rest_is_not() -> None:
    """Inside the box nothing is recognisable; beyond the soft edge every pixel is as it was."""
    image = checkered()
    blurred = blur_faces(image, [FACE])
    assert contrast(image, FACE) > 120
    assert contrast(blurred, (0.28, 0.28, 0.47, 0.47)) < 30
    changed = (np.asarray(blurred) != np.asarray(image)).any(axis=2)
    rows, columns = changed.nonzero()
    # The box of 40 pixels, a margin of 4, and a mask blurred with sigma 4.
    assert min(rows.min(), columns.min()) >= 40 - 4 - 16
    assert max(rows.max(), columns.max()) <= 80 + 4 + 16


def test_it_is_the_method_of_datacomps_tool() -> None:
    """Against the formula, computed in float with numpy: img·(1 − m) + blur(img)·m, m blurred."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    boxes: list[Box] = [(0.1, 0.2, 0.3, 0.5), (0.6, 0.5, 0.9, 0.7)]
    mask = np.zeros((90, 120, 1))
    longest = 0
    for x0, y0, x1, y1 in boxes:
        sides = int(x0 * 120), int(y0 * 90), int(x1 * 120), int(y1 * 90)
        diagonal = max(sides[2] - sides[0], sides[3] - sides[1])
        longest = max(longest, diagonal)
        left, top = (int(side - 0.1 * diagonal) for side in sides[:2])
        right, bottom = (int(side + 0.1 * diagonal) for side in sides[2:])
        mask[max(top, 0) : min(bottom, 89), max(left, 0) : min(right, 119)] = 1
    sigma = 0.1 * longest
    soft = gaussian(mask, sigma)
    pixels = np.asarray(image, dtype=float)
    expected = pixels * (1 - soft) + gaussian(pixels, sigma) * soft
    found = np.asarray(blur_faces(image, boxes), dtype=float)
    # Pillow approximates the Gaussian by box blurs.
    assert np.abs(found - expected).mean() < 2
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.998


def gaussian(values: Any, sigma: float) -> Any:
    """A Gaussian blur over rows and columns, edges continued, by its definition."""
    radius = int(4 * sigma + 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(values, pad, mode="edge")
        size = values.shape[axis]
        parts = [w * np.take(padded, range(i, i + size), axis=axis) for i, w in enumerate(weights)]
        values = sum(parts)
    return values


@pytest.mark.parametrize("faces", [(), ((0.5, 0.5, 0.5, 0.5),), ((2.0, 2.0, 3.0, 3.0),)])
def test_without_a_face_nothing_changes(faces: tuple[Box, ...]) -> None:
    """No box, an empty one, one beyond the picture."""
    image = checkered()
    assert np.array_equal(np.asarray(blur_faces(image, faces)), np.asarray(image))


@given(
    box=st.tuples(*[st.floats(-2, 3, allow_nan=False)] * 4),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
)
def test_any_box_can_be_blurred(box: Box, width: int, height: int) -> None:
    """Turned around, beyond the edges, thinner than a pixel: the size stays, nothing raises."""
    assert blur_faces(checkered(width, height), [box]).size == (width, height)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_stored_picture(kind: str, orientation: int) -> None:
    """Blurred as stored, then turned upright just as a picture without faces is."""
    stored = checkered(200, 120)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(stored, kind, exif=exif, **options)
    settings = DecodeSettings(size=120)
    face: Box = (0.3, 0.1, 0.6, 0.5)
    shown = decode_image(data, settings, [face])
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        blurred = encoded(blur_faces(opened.convert("RGB"), [face]), "PNG", exif=exif)
    expected = decode_image(blurred, settings)
    assert (shown.width, shown.height) == (expected.width, expected.height)
    assert np.array_equal(shown.pixels, expected.pixels)
    assert not np.array_equal(shown.pixels, decode_image(data, settings).pixels)


def test_the_encode_step_blurs_what_the_source_lists() -> None:
    """Tokens are of the blurred picture; the hash stays that of the original bytes."""
    half = Image.new("RGB", (32, 32))
    half.paste((255, 255, 255), (0, 0, 16, 32))
    data = encoded(half, "PNG")
    whole: Box = (0.0, 0.0, 1.0, 1.0)
    records = [ImageRecord(0, "plain", data), ImageRecord(1, "face", data, faces=(whole,))]
    done = encode_shard(Brightness(), records, small())
    plain, face = done.tokens[0], done.tokens[1]
    assert plain.tolist() == [[255, 0], [255, 0]]
    assert 0 < face[0, 1] < face[0, 0] < 255
    assert done.images[0].sha256 == done.images[1].sha256
    assert Image.open(io.BytesIO(data)).size == (32, 32)
