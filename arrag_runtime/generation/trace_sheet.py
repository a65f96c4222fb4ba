"""The trace of generated pictures, drawn: where retrieval spoke, and whose patches it brought.

In: pictures, traces, and reconstructions of the heaviest sources. Out: one picture. Each generated
picture has a row: itself, the same with a heat map (red: the token came from retrieval), then its
heaviest source pictures with the number of tokens expected to stem from each.
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from arrag_runtime.format.images import ImageRow
from arrag_runtime.generation.picture_grid import FAINT, INK, font
from arrag_runtime.generation.trace import SourceImage, TokenTrace, Traced, heat, source_weights

_TILE, _TEXT, _TOP, _GAP, _MARGIN = 168, 64, 64, 12, 24
_MOST_SOURCES = 6
_HOT = (225, 29, 72)


def heaviest_sources(trace: Sequence[TokenTrace]) -> dict[SourceImage, float]:
    """The sources that a sheet shows for a picture, with their weights."""
    return dict(islice(source_weights(trace).items(), _MOST_SOURCES))


def draw_trace(
    rows: Sequence[Traced],
    grid: tuple[int, int],
    sources: Mapping[SourceImage, npt.NDArray[np.uint8]],
    origins: Mapping[SourceImage, ImageRow],
    title: str,
) -> Image.Image:
    """The sheet. sources: reconstructions uint8 [H, W, 3]. grid: (h, w) of tokens."""
    columns = 2 + max((len(heaviest_sources(row.trace)) for row in rows), default=0)
    across = 2 * _MARGIN + max(columns, 5) * (_TILE + _GAP) - _GAP
    down = _MARGIN + _TOP + len(rows) * (_TILE + _TEXT) + _MARGIN
    sheet = Image.new("RGB", (across, down), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, INK, font(18))
    legend = (
        "Red: the token came from retrieval. Right: the source pictures, as the tokenizer sees"
        " them, that most tokens stem from."
    )
    draw.text((_MARGIN, _MARGIN + 28), legend, FAINT, font(12))
    for number, row in enumerate(rows):
        y = _MARGIN + _TOP + number * (_TILE + _TEXT)
        picture = Image.fromarray(row.pixels).resize((_TILE, _TILE), Image.Resampling.LANCZOS)
        heated = _heated(picture, heat(row.trace, *grid))
        tiles = [(picture, f"seed {row.seed}", row.prompt), (heated, *_of(row))]
        for source, weight in heaviest_sources(row.trace).items():
            if source in sources:
                tile = Image.fromarray(sources[source]).resize((_TILE, _TILE))
                tiles.append((tile, f"{weight:.1f} tokens", _name(source, origins.get(source))))
        for column, (tile, first, rest) in enumerate(tiles):
            x = _MARGIN + column * (_TILE + _GAP)
            sheet.paste(tile, (x, y))
            draw.text((x, y + _TILE + 2), first, INK, font(12))
            wrapped = "\n".join(textwrap.wrap(rest, 27, max_lines=3, placeholder="…"))
            draw.multiline_text((x, y + _TILE + 17), wrapped, FAINT, font(11), spacing=1)
    return sheet


def _of(row: Traced) -> tuple[str, str]:
    total = sum(token.weight for token in row.trace)
    share = f"{total:.1f} of {len(row.trace)} tokens retrieved"
    if row.copy is None:
        return share, "no token repeats a source"
    return share, f"longest run that repeats one source: {row.copy.length}"


def _name(source: SourceImage, origin: ImageRow | None) -> str:
    if origin is None:
        return f"image {source[1]}"
    licence = f" ({origin.licence})" if origin.licence else ""
    return f"{origin.caption or origin.key}{licence}"


def _heated(picture: Image.Image, values: npt.NDArray[np.float64]) -> Image.Image:
    """A pale picture with red where values (0..1, [h, w]) are high."""
    white, red = (Image.new("RGB", picture.size, color) for color in ("white", _HOT))
    grey = Image.blend(picture.convert("L").convert("RGB"), white, 0.5)
    strength = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    return Image.composite(red, grey, strength.resize(picture.size, Image.Resampling.NEAREST))
