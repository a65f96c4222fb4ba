"""A contact sheet of a query: for each position the neighbourhood asked about and what was found.

Everything is cut from reconstructions, since tokens are all that the database keeps of a picture.
The patch that comes next is framed; the neighbours that form the key are outlined.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import Layout
from arrag_runtime.generation.picture_grid import FAINT, INK, font, save_png
from arrag_runtime.progress import Progress, silent
from arrag_runtime.tokenizers import Tokenizer
from pipeline.query import PositionResult, QueryAnswer, load_database_tokenizer
from schemas.settings.query import QuerySettings

TILE, GAP, MARGIN, TEXT = 132, 14, 28, 46
REACH = 2
"""Patches shown on each side of the one that comes next."""
MAX_ROWS, MAX_NEIGHBORS = 8, 8
FRAME, KEY = (225, 29, 72), (37, 99, 235)
LEGEND = (
    (INK, "Left: the query's picture, as the tokenizer sees it. Each row below is one position."),
    (KEY, "Blue outline: the neighbours whose tokens form the key."),
    (FRAME, "Red frame: the patch that comes next; in the results, what the database offers."),
    (KEY, "Blue text: the very token that stands in the query's picture."),
)


def save_sheet(
    answer: QueryAnswer, settings: QuerySettings, path: Path, progress: Progress = silent
) -> None:
    """Draw an answer to a PNG, with what was asked as its title."""
    asked = settings.image.name if settings.image else ",".join(map(str, settings.tokens or ()))
    layout = Layout(settings.databases[0])
    tokenizer = load_database_tokenizer(layout, answer.manifest, settings.tokenizer_weights)
    save_png(draw_sheet(answer, tokenizer, f"Query {asked}", progress), path)


def draw_sheet(
    answer: QueryAnswer, tokenizer: Tokenizer, title: str, progress: Progress = silent
) -> Image.Image:
    """Draw up to eight of the answer's positions, spread evenly, with up to eight results each."""
    results = _spread(answer.results, MAX_ROWS)
    shown = [n for result in results for n in result.neighbors[:MAX_NEIGHBORS]]
    height = answer.manifest.tokenizer.grid_height
    grids: dict[int, npt.NDArray[np.uint16]] = {}
    for database in {n.database for n in shown}:
        sources = {n.image_id for n in shown if n.database == database}
        grids |= ImageTable(Layout(database).images).grids(sorted(sources), height)
    pictures = {}
    for done, (image, grid) in enumerate(grids.items(), start=1):
        pictures[image] = tokenizer.decode(grid[None])[0]
        progress("reconstructing", done, len(grids))
    asked = None if answer.grid is None else tokenizer.decode(answer.grid[None])[0]
    columns = max((min(len(r.neighbors), MAX_NEIGHBORS) for r in results), default=0)
    left = TILE + 4 * GAP
    width = max(760, 2 * MARGIN + left + columns * (TILE + GAP))
    overview = 0 if asked is None else TILE * 2
    top = MARGIN + 64 + (overview + GAP if overview else 0)
    sheet = Image.new("RGB", (width, top + len(results) * (TILE + TEXT) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    spec, keys = answer.manifest.tokenizer, answer.manifest.keys
    legend = (
        f"{len(results)} of {len(answer.results)} positions; nearest first, squared L2 distance d"
        f" between {keys.neighborhood.name} keys; index {answer.index}, tokenizer {spec.name}"
    )
    draw.text((MARGIN, MARGIN), title, INK, font(20))
    draw.text((MARGIN, MARGIN + 28), legend, FAINT, font(13))
    if asked is not None:
        _overview(sheet, asked, results, height, (MARGIN, MARGIN + 64), overview)
    for index, result in enumerate(results):
        y = top + index * (TILE + TEXT)
        if asked is not None and result.row is not None and result.col is not None:
            tile = _cut(asked, result.row, result.col, height, keys.neighborhood.offsets)
            sheet.paste(tile, (MARGIN, y))
            asked_at = f"{index + 1}. query at row {result.row}, col {result.col}"
            text = f"{asked_at}\nits token {result.token}"
        else:
            text = "query by tokens\n" + ", ".join(map(str, result.key))
        _caption(draw, (MARGIN, y + TILE + 2), text, INK)
        for rank, neighbor in enumerate(result.neighbors[:MAX_NEIGHBORS]):
            x = MARGIN + left + rank * (TILE + GAP)
            if neighbor.image_id in pictures:
                picture = pictures[neighbor.image_id]
                tile = _cut(picture, neighbor.row, neighbor.col, height, keys.neighborhood.offsets)
                sheet.paste(tile, (x, y))
            color = KEY if neighbor.token == result.token else INK
            name = neighbor.caption or neighbor.key or f"image {neighbor.image_id}"
            lines = textwrap.wrap(name, 24, max_lines=2, placeholder="…")
            text = "\n".join([f"d {neighbor.distance:.3f}  token {neighbor.token}", *lines])
            _caption(draw, (x, y + TILE + 2), text, color)
    return sheet


def _spread(results: Sequence[PositionResult], count: int) -> list[PositionResult]:
    """Up to `count` results, spread over the picture."""
    if len(results) <= count:
        return list(results)
    at = (np.linspace(0, 1, count + 2)[1:-1] * len(results)).astype(int)
    # A step along the row for each, or they would all stand in one column of the grid.
    return [results[min(i + 5 * n % 17, len(results) - 1)] for n, i in enumerate(at)]


def _cut(
    picture: npt.NDArray[np.uint8],
    row: int,
    col: int,
    grid_height: int,
    offsets: Sequence[tuple[int, int]],
) -> Image.Image:
    """The patch at (row, col) with its surroundings, white beyond the picture's edge."""
    patch = picture.shape[0] // grid_height
    pad = REACH * patch
    padded = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    side = (2 * REACH + 1) * patch
    cut = padded[row * patch : row * patch + side, col * patch : col * patch + side]
    tile = Image.fromarray(cut).resize((TILE, TILE), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(tile)
    cell = TILE / (2 * REACH + 1)
    for r, c in offsets:
        if max(abs(r), abs(c)) <= REACH:
            draw.rectangle(_cell(r, c, cell), outline=KEY)
    draw.rectangle(_cell(0, 0, cell), outline=FRAME, width=3)
    return tile


def _cell(row: int, col: int, cell: float) -> tuple[float, float, float, float]:
    x, y = (col + REACH) * cell, (row + REACH) * cell
    return (x, y, x + cell - 1, y + cell - 1)


def _overview(
    sheet: Image.Image,
    picture: npt.NDArray[np.uint8],
    results: Sequence[PositionResult],
    grid_height: int,
    at: tuple[int, int],
    side: int,
) -> None:
    """The query's picture as the tokenizer sees it, with the positions asked about."""
    small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(small)
    cell = side / grid_height
    for number, result in enumerate(results, start=1):
        if result.row is not None and result.col is not None:
            x, y = result.col * cell, result.row * cell
            draw.rectangle((x, y, x + cell, y + cell), outline=FRAME, width=2)
            place = (x + cell + 2, y - 2)
            draw.text(place, str(number), FRAME, font(13), stroke_width=2, stroke_fill="white")
    sheet.paste(small, at)
    draw = ImageDraw.Draw(sheet)
    x = at[0] + side + 2 * GAP
    for line, (color, text) in enumerate(LEGEND):
        draw.text((x, at[1] + 4 + line * 24), text, color, font(13))


def _caption(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, color: tuple[int, int, int]
) -> None:
    first, _, rest = text.partition("\n")
    draw.text(at, first, color, font(11))
    draw.multiline_text((at[0], at[1] + 13), rest, FAINT, font(10), spacing=1)
