"""Ask a database what came next: by a picture's positions, or by a key of tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids, split_patch_ids
from arrag_runtime.format.images import ImageRow, ImageTable
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook
from arrag_runtime.format.specs import require_same_tokenizer
from arrag_runtime.search.index_group import IndexGroup
from arrag_runtime.search.neighbors import Neighbors
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.tokenizers import Tokenizer, load_tokenizer
from schemas.settings.query import QuerySettings
from stages.encode.decode import DecodeSettings, UndecodableError, decode_image


@dataclass(frozen=True)
class Neighbor:
    """One retrieved entry and where it came from.

    distance: squared L2, in the index's weighted units where it has weights; copies: how many
    identical entries it stands for; database: the root of the one it is from.
    """

    rank: int
    distance: float
    token: int
    patch_id: int
    image_id: int
    row: int
    col: int
    caption: str | None
    url: str | None
    key: str
    licence: str | None
    copies: int
    database: str


@dataclass(frozen=True)
class PositionResult:
    """The neighbours of one query. row and col are None for a query by tokens.

    token is what really stands at the position of the query's picture, None where unknown.
    """

    row: int | None
    col: int | None
    key: tuple[int, ...]
    token: int | None
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class QueryAnswer:
    """The results, and what they were made with; grid: uint16 [h, w] of the query's picture."""

    results: tuple[PositionResult, ...]
    manifest: DatabaseManifest
    index: str
    grid: npt.NDArray[np.uint16] | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"results": [asdict(result) for result in self.results], "index": self.index}


def query(settings: QuerySettings) -> QueryAnswer:
    """Answer a query.

        answer = query(QuerySettings(databases=("mydb",), image=Path("hat.jpg"), row=12, col=11))
        for neighbor in answer.results[0].neighbors:
            print(neighbor.distance, neighbor.token, neighbor.url)

    Raises BadInputError for a picture, position or token that cannot be used.
    """
    layouts = [Layout(database) for database in settings.databases]
    layout = layouts[0]
    manifest = DatabaseManifest.read(layout)
    if (settings.image is None) == (settings.tokens is None):
        raise BadInputError("give either --image FILE or --tokens 'a,b,c,d'")
    if settings.image is None and (settings.row is not None or settings.col is not None):
        raise BadInputError("--row and --col say where in an --image; with --tokens leave them out")
    if (settings.row is None) != (settings.col is None):
        raise BadInputError("--row and --col go together; give both, or neither for every position")
    index = IndexGroup([PatchIndex.open(one.root, settings.index) for one in layouts])
    keep, notes = _kept(settings, layouts)
    grid = None
    if settings.tokens is not None:
        positions: list[tuple[int | None, int | None]] = [(None, None)]
        keys = _typed_key(settings.tokens, manifest)
    else:
        assert settings.image is not None
        tokenizer = load_database_tokenizer(layout, manifest, settings.tokenizer_weights)
        grid = _tokenize_file(settings.image, tokenizer, manifest)
        positions, keys = _picture_keys(grid, settings, manifest)
    own = _own_images(settings, layouts)
    exclude = np.tile(np.array(own, np.int64), (len(keys), 1)) if own else None
    found = index.search(keys, settings.k, exclude=exclude, keep=keep)
    rows = _image_rows(layouts, found)
    results = tuple(
        PositionResult(
            row=row,
            col=col,
            key=tuple(keys[n].tolist()),
            token=None if grid is None else int(grid[row, col]),
            neighbors=_trace(found, n, rows, layouts, manifest.tokenizer.grid_width),
        )
        for n, (row, col) in enumerate(positions)
    )
    return QueryAnswer(results, manifest, index.manifest.name, grid, notes)


def _kept(
    settings: QuerySettings, layouts: Sequence[Layout]
) -> tuple[list[Ids | None] | None, tuple[str, ...]]:
    """For each database the pictures that the filter keeps, ascending, and what that costs."""
    if settings.where is None:
        return None, ()
    tables = [ImageTable(layout.images) for layout in layouts]
    kept: list[Ids | None] = []
    for images in tables:
        batches = images.batches(["image_id"], 1 << 18, settings.where)
        ids = [batch.column("image_id").to_numpy() for batch in batches]
        kept.append(np.sort(np.concatenate([np.empty(0, np.int64), *ids])))
    total = sum(images.count for images in tables)
    chosen = sum(len(ids) for ids in kept if ids is not None)
    if not chosen:
        raise BadInputError(f"--where '{settings.where}' keeps none of {total:,} pictures")
    share = chosen / total
    return kept, (
        f"--where keeps {chosen:,} of {total:,} pictures ({share:.2%}), so about"
        f" {1 / share:,.0f} times as many entries are looked at",
    )


def _own_images(settings: QuerySettings, layouts: Sequence[Layout]) -> list[int]:
    """The ids of the query's own picture and its copies, where they are to be left out."""
    if not settings.exclude_self:
        return []
    if settings.image is None:
        raise BadInputError("--exclude-self leaves out the --image itself; --tokens names none")
    sha256 = hashlib.sha256(_read(settings.image)).hexdigest()
    copies = (ImageTable(layout.images).copies([sha256]).get(sha256, []) for layout in layouts)
    return [image for ids in copies for image in ids]


def load_database_tokenizer(
    layout: Layout, manifest: DatabaseManifest, weights: str | None = None
) -> Tokenizer:
    """The tokenizer a database was built with, on the CPU. Raises IncompatibleError if changed."""
    tokenizer = load_tokenizer(manifest.tokenizer.name, weights or manifest.tokenizer_weights)
    require_same_tokenizer(
        manifest.tokenizer, read_codebook(layout), tokenizer.spec, tokenizer.codebook()
    )
    # On a CPU as it was encoded; what a GPU encoded is asked for in float32, the nearest to it.
    on_cpu = manifest.encoder.device == "cpu"
    tokenizer.setup("cpu", precision=manifest.encoder.precision if on_cpu else "float32")
    return tokenizer


def _tokenize_file(
    path: Path, tokenizer: Tokenizer, manifest: DatabaseManifest
) -> npt.NDArray[np.uint16]:
    """The token grid uint16 [h, w] of a picture, made the way the database's grids were.

    The picture stands alone in a batch of the size the database was encoded with on a CPU, since
    the size changes a few ids; those of a GPU differ from a CPU's anyway.
    """
    size = manifest.tokenizer.image_size
    settings = DecodeSettings(size=size, min_side=1)
    try:
        pixels = decode_image(_read(path), settings).pixels
    except UndecodableError as error:
        raise BadInputError(
            f"--image '{path}' cannot be used: {error}; give a JPEG, PNG or WebP picture"
        ) from error
    encoder = manifest.encoder
    batch = np.zeros(
        (encoder.batch_size if encoder.device == "cpu" else 1, size, size, 3), np.uint8
    )
    batch[0] = pixels
    grid: npt.NDArray[np.uint16] = tokenizer.encode(batch).tokens[0]
    return grid


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise BadInputError(f"cannot read --image '{path}': {error.strerror}") from error


def _typed_key(tokens: Sequence[int], manifest: DatabaseManifest) -> npt.NDArray[np.uint16]:
    size, vocabulary = manifest.keys.neighborhood.size, manifest.tokenizer.vocabulary
    if len(tokens) != size:
        offsets = " ".join(f"({r:+d},{c:+d})" for r, c in manifest.keys.neighborhood.offsets)
        raise BadInputError(
            f"--tokens has {len(tokens)} tokens, but a key of {manifest.keys.neighborhood.name} has"
            f" {size}: the tokens at (row, column) offsets {offsets}"
        )
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise BadInputError(f"token {token} is outside the codebook; use 0..{vocabulary - 1}")
    return np.array([tokens], dtype=np.uint16)


def _picture_keys(
    grid: npt.NDArray[np.uint16], settings: QuerySettings, manifest: DatabaseManifest
) -> tuple[list[tuple[int | None, int | None]], npt.NDArray[np.uint16]]:
    hood = manifest.keys.neighborhood
    if settings.row is not None and settings.col is not None:
        key = hood.key_at(grid[None], settings.row, settings.col)
        if key is None:
            rows, cols = np.divmod(hood.positions(*grid.shape), grid.shape[1])
            raise BadInputError(
                f"position ({settings.row}, {settings.col}) has no full {hood.name} neighbourhood"
                f" and the database skips such borders; use rows {rows.min()}..{rows.max()} and"
                f" columns {cols.min()}..{cols.max()}"
            )
        return [(settings.row, settings.col)], key
    at = np.stack(np.divmod(hood.positions(*grid.shape), grid.shape[1]), axis=1)
    return [(int(row), int(col)) for row, col in at], hood.keys(grid[None])[0]


def _image_rows(layouts: Sequence[Layout], found: Neighbors) -> dict[tuple[int, int], ImageRow]:
    """The pictures that results come from, by database and id."""
    rows = {}
    for number, layout in enumerate(layouts):
        real = (found.patch_ids >= 0) & (found.origin == number)
        ids = np.unique(split_patch_ids(found.patch_ids[real])[0]).tolist()
        for image, row in ImageTable(layout.images).rows(ids).items():
            rows[number, image] = row
    return rows


def _trace(
    found: Neighbors,
    query: int,
    rows: dict[tuple[int, int], ImageRow],
    layouts: Sequence[Layout],
    width: int,
) -> tuple[Neighbor, ...]:
    """The real neighbours of one query, each with the picture and position it came from."""
    neighbors = []
    for rank in range(int(found.count[query])):
        patch, number = int(found.patch_ids[query, rank]), int(found.origin[query, rank])
        image, position = (int(x) for x in split_patch_ids(np.int64(patch)))  # type: ignore[arg-type]
        origin = rows.get((number, image))
        neighbors.append(
            Neighbor(
                rank=rank + 1,
                distance=float(found.distances[query, rank]),
                token=int(found.tokens[query, rank]),
                patch_id=patch,
                image_id=image,
                row=position // width,
                col=position % width,
                caption=origin.caption if origin else None,
                url=origin.url if origin else None,
                key=origin.key if origin else "",
                licence=origin.licence if origin else None,
                copies=int(found.copies[query, rank]),
                database=layouts[number].root,
            )
        )
    return tuple(neighbors)
