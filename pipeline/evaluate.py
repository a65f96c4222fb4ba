"""Evaluate a database: what its indexes retrieve for positions whose next token is known.

In: a database and which of its indexes. Out: for each the figures of
`stages/measure/evaluate_tokens.py`, from the same held-out pictures (where there are none, from
pictures of the database with their own patches left out), side by side as text, JSON or a drawing.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.location import local_folder
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout, read_codebook
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.format.specs import Floats
from arrag_runtime.progress import Progress, silent
from arrag_runtime.search.codebook_search import CodebookSearch
from arrag_runtime.search.neighbors import Neighbors
from arrag_runtime.search.patch_index import PatchIndex, index_folders, open_engine
from arrag_runtime.search.tombstones import Tombstones
from pipeline.indexing.exact import copies_left_aside, exact_neighbors
from schemas.settings.evaluate import EvaluateSettings
from schemas.settings.resources import RayResources
from stages.index.index_contents import left_out
from stages.measure.evaluate_tokens import (
    RANKS,
    Measured,
    TokenFigures,
    evaluate_tokens,
    likelihood_gain,
)
from stages.measure.exact_search import Queries, true_distances
from stages.measure.fit_weights import corpus_prior
from stages.measure.retrieved_distribution import Probabilities
from stages.measure.sample_queries import sample_queries

_PRIOR_ROWS = 4_000_000
"""The corpus prior is counted over the whole table up to this size, and over a sample beyond."""
_EXACT_KINDS = ("flat", "codebook")
"""Kinds whose distances are true; others report approximations."""


@dataclass(frozen=True)
class EvaluatedIndex:
    """An index and its figures.

    gain: by how many nats a token it makes the true one likelier than the first index listed does;
    None for that one itself, and where the two were asked other questions.
    """

    name: str
    kind: str
    keys: str
    count: int
    nprobe: int | None
    weights: tuple[float, ...] | None
    protocol: str
    figures: TokenFigures
    gain: Measured | None

    def to_json(self) -> dict[str, Any]:
        """What the index is, and its figures beside."""
        own = {n: value for n, value in vars(self).items() if n not in ("figures", "gain")}
        gain = None if self.gain is None else vars(self.gain)
        return own | self.figures.to_json() | {"nll_gain_over_first": gain}


@dataclass(frozen=True)
class Evaluation:
    """The figures of several indexes of a database."""

    database: str
    k: int
    indexes: tuple[EvaluatedIndex, ...]

    @property
    def title(self) -> str:
        """One line for a drawing: what was asked."""
        first = self.indexes[0]
        return f"{first.protocol}; K = {self.k:,} of {first.count:,} keys, {first.keys}"

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        indexes = {index.name: index.to_json() for index in self.indexes}
        return {"database": self.database, "k": self.k, "indexes": indexes}

    def to_text(self) -> str:
        """A table for people: a row a figure, a column an index."""
        shortest = min(len(index.figures.token_distance) for index in self.indexes)
        depths = [k for k in (1, 10, RANKS) if k <= shortest]
        columns = [self._column(index, depths) for index in self.indexes]
        label = max(map(len, columns[0]))
        widths = [max(map(len, column.values())) for column in columns]
        lines = []
        for name in columns[0]:
            cells = (f"{c[name]:>{width}}" for c, width in zip(columns, widths, strict=True))
            lines.append("  ".join([f"{name:{label}}", *cells]).rstrip())
        notes = sorted({index.protocol for index in self.indexes})
        lines += [f"{note}; 95% intervals by resampling pictures" for note in notes]
        return "\n".join(lines)

    def _column(self, index: EvaluatedIndex, depths: list[int]) -> dict[str, str]:
        """The cells of one index by the labels of their rows."""
        found = index.figures
        cells = {
            "": index.name,
            "keys": index.keys,
            "kind, nprobe": f"{index.kind}, {index.nprobe or '-'}",
        }
        cells |= {f"recall@{k}": _cell(found.recall.get(str(k))) for k in depths}
        for k in depths:
            rank = "nearest" if k == 1 else f"{k}th"
            cells[f"distance of the {rank}"] = _cell(found.token_distance[k - 1])
        cells["distance of a corpus token"] = _cell(found.prior_distance)
        cells["distance of a random code"] = _cell(found.random_distance)
        cells |= {f"true token among {k}": _cell(found.hit_rate[k - 1]) for k in depths}
        cells["negative log likelihood"] = _cell(found.nll)
        if len(self.indexes) > 1:
            cells[f"  gain over {self.indexes[0].name}"] = _cell(index.gain)
        cells["  at temperature, back-off"] = f"{found.nll_temperature}, {found.nll_backoff}"
        cells["  of the corpus prior"] = _cell(found.prior_nll)
        return cells


def evaluate(
    settings: EvaluateSettings,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _cost: None,
) -> Evaluation:
    """Evaluate indexes of a database.

        found = evaluate(EvaluateSettings(database="mydb", indexes=("codebook",), k=100))
        print(found.to_text())

    progress counts rows; announce is told what a long search will cost before it starts. Raises
    BadInputError where the database has no such index, or no pictures to ask with.
    """
    layout = Layout(settings.database)
    manifest = DatabaseManifest.read(layout)
    codes = read_codebook(layout)
    names = settings.indexes or tuple(folder.rpartition("/")[2] for folder in index_folders(layout))
    if not names:
        raise BadInputError(
            f"database {layout.root} has no index to evaluate; build one with `arrag-db index"
            f" --db {layout.root}`"
        )
    images = ImageTable(layout.images, Tombstones(layout).ids)
    asked: dict[str, Queries] = {}
    exact: dict[tuple[Any, ...], Neighbors] = {}
    priors: dict[tuple[str, int], Probabilities] = {}
    found: list[EvaluatedIndex] = []
    for name in names:
        index = PatchIndex.open(layout.root, name)
        made = index.manifest
        table = PatchTable(layout.patches(made.keys), made.table_version)
        keys = made.keys.name
        if keys not in asked:
            asked[keys] = sample_queries(
                images,
                manifest.tokenizer,
                made.keys,
                pictures=settings.pictures,
                queries=settings.queries,
                seed=settings.seed,
            )
        queries = asked[keys]
        if not len(queries.keys):
            raise BadInputError(f"database {layout.root} has no pictures to ask with; build first")
        skip, without = _not_entries(layout, made, codes)
        digests = (hashlib.sha256(ids.tobytes()).hexdigest() for ids in (skip, without))
        metric = (keys, table.version, made.weights, *digests)
        if metric not in exact:
            exact[metric] = exact_neighbors(
                table,
                codes,
                queries,
                RANKS,
                weights=made.weights,
                skip=skip,
                left_out=without,
                resources=RayResources(address=settings.ray) if settings.ray else None,
                announce=announce,
                progress=lambda done, total: progress("searching exactly", done, total),
            )
        if (corpus := (keys, table.version)) not in priors:
            priors[corpus] = _prior(table, len(codes), settings.seed)
        progress(f"searching {name}", 0, 1)
        answer = index.search(queries.keys, settings.k, exclude=queries.excluded)
        distances = answer.distances[:, :RANKS]
        if made.kind not in _EXACT_KINDS:
            ids = answer.patch_ids[:, :RANKS]
            distances = true_distances(table.blocks(), codes, queries, ids, weights=made.weights)
        figures = evaluate_tokens(
            queries, answer, exact[metric], distances, codes, priors[corpus], seed=settings.seed
        )
        gain = None
        if found and found[0].keys == keys:
            gain = likelihood_gain(found[0].figures, figures, queries.images, seed=settings.seed)
        found.append(
            EvaluatedIndex(
                name=name,
                kind=made.kind,
                keys=keys,
                count=made.count,
                nprobe=index.nprobe,
                weights=made.weights,
                protocol=queries.protocol,
                figures=figures,
                gain=gain,
            )
        )
    return Evaluation(layout.root, settings.k, tuple(found))


def _not_entries(layout: Layout, made: IndexManifest, codes: Floats) -> tuple[Ids, Ids]:
    """Patch ids that an index stores as copies of another, and pictures that it does not return."""
    folder = local_folder(layout.index(made.name))
    engine, _ = open_engine(made, folder, codes)
    parts = engine.parts if isinstance(engine, CodebookSearch) else ()
    return copies_left_aside(parts), np.union1d(left_out(folder), Tombstones(layout).ids)


def _prior(table: PatchTable, vocabulary: int, seed: int) -> Probabilities:
    """The corpus prior of next tokens, float64 [V]."""
    if table.count > _PRIOR_ROWS:
        return corpus_prior(table.sample(_PRIOR_ROWS // 4, seed=seed).next_tokens, vocabulary)
    blocks = [np.empty(0, np.uint16), *(block.next_tokens for block in table.blocks())]
    return corpus_prior(np.concatenate(blocks), vocabulary)


def _cell(found: Any) -> str:
    """A mean with its interval; nothing where it was not measured."""
    return "-" if found is None else f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
