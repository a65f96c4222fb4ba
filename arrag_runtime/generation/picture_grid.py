"""Pictures of generated pictures: several in a grid, or the same prompts under several methods.

In: pixels uint8 [N, H, W, 3]. Out: one picture, and files that are never seen half-written.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from arrag_runtime.tokenizers import Pixels

_GAP, _MARGIN, _TITLE = 12, 24, 30
INK, FAINT = (24, 24, 27), (113, 113, 122)
font = ImageFont.load_default
"""Pillow's own typeface, of a size."""


def grid_picture(pictures: Pixels) -> Image.Image:
    """The pictures in rows, as square as it gets, without words; a single one stays as it is."""
    count, height, width, _ = pictures.shape
    columns = int(np.ceil(count**0.5))
    rows = -(-count // columns)
    if count == 1:
        return Image.fromarray(pictures[0])
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new("RGB", size, "white")
    for number, picture in enumerate(pictures):
        row, col = divmod(number, columns)
        sheet.paste(Image.fromarray(picture), (col * (width + _GAP), row * (height + _GAP)))
    return sheet


def comparison(columns: Sequence[tuple[str, Pixels]], prompts: Sequence[str]) -> Image.Image:
    """A column per method and a row per picture: the same prompt and seed under each.

    columns: (name of the method, pixels [N, H, W, 3]). prompts: one per row, N.
    """
    height, width = columns[0][1].shape[1:3]
    top, row_height = _MARGIN + _TITLE, height + _GAP + _TITLE
    across = 2 * _MARGIN + len(columns) * (width + _GAP) - _GAP
    down = top + len(prompts) * row_height + _MARGIN - _GAP
    sheet = Image.new("RGB", (across, down), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, pictures) in enumerate(columns):
        x = _MARGIN + number * (width + _GAP)
        draw.text((x, _MARGIN), name, INK, font(18))
        for row, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (x, top + row * row_height))
    for row, prompt in enumerate(prompts):
        text = textwrap.shorten(prompt, 40 * len(columns), placeholder="…")
        draw.text((_MARGIN, top + row * row_height + height + 6), text, FAINT, font(14))
    return sheet


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG; its folder is created, and a half-written file is never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    picture.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
