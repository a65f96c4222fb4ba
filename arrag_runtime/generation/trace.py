"""Where a generated picture came from: for each token, the retrieved entries behind it.

In: the choices of a decode loop, as its watcher. Out: for each picture and position the token, its
probability with and without retrieval, and the entries that raised it.

With DAiD a token is drawn from (1 - λ) · p_model + λ · p_retrieved. Given that token v came out,
the probability that it came through entry k is λ · share_k / p(v): that is the entry's `weight`,
and the weights of a source summed over a picture are the number of tokens that are expected to
stem from it. With FAiD there is no such account; entries that offered the chosen token share one
weight of (their number / number of candidates) instead, which says that they agree, not that they
caused it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.daid import DaidSettings, counting
from arrag_runtime.format.ids import MAX_POSITIONS, POSITION_BITS
from arrag_runtime.format.images import ImageRow
from arrag_runtime.generation.copied_runs import CopyRun
from arrag_runtime.search.neighbors import Neighbors

if TYPE_CHECKING:
    from arrag_runtime.generation.decode_loop import Choice

SourceImage = tuple[int, int]
"""A picture that was retrieved from: the number of its database, and its image id."""
_MOST_ENTRIES = 16
"""Entries listed for a token, the heaviest; `entries_left_out` counts the others."""
_ABOUT = ("key", "source", "caption", "url", "licence")
"""What is told of a source picture."""


@dataclass(frozen=True)
class RetrievedEntry:
    """A retrieved entry that raised a token."""

    patch_id: int
    """The patch it is from."""
    distance: float
    """Squared L2 between its key and the one asked for."""
    weight: float
    """How much of the token came from it, 0..1."""
    database: int = 0
    """The number of the database it is from, where several are searched as one."""

    @property
    def source(self) -> SourceImage:
        """The picture it was cut from."""
        return self.database, self.patch_id >> POSITION_BITS


@dataclass(frozen=True)
class TokenTrace:
    """A generated token, its probability without and with retrieval, and what raised it."""

    row: int
    col: int
    token: int
    p_model: float
    p_mixed: float
    entries: tuple[RetrievedEntry, ...]
    """The retrieved entries that raised it, heaviest first."""

    @property
    def weight(self) -> float:
        """How much of it came from retrieval, 0..1."""
        return sum(entry.weight for entry in self.entries)


@dataclass(frozen=True)
class Traced:
    """A generated picture, uint8 [H, W, 3], its tokens' traces, and its longest copied run."""

    prompt: str
    seed: int
    pixels: npt.NDArray[np.uint8]
    trace: Sequence[TokenTrace]
    copy: CopyRun | None


class Tracer:
    """Collects traces while pictures are decoded: pass it to `generate` as `watch`."""

    def __init__(self, images: int, mixing: DaidSettings | None, candidates: int = 0) -> None:
        """images: how many are generated in all. candidates: with FAiD, its K; 0 without."""
        self.traces: list[list[TokenTrace]] = [[] for _ in range(images)]
        self._mixing, self._candidates = mixing, candidates

    def __call__(self, first: int, choice: "Choice") -> None:
        tokens = choice.tokens.tolist()
        before, after = choice.p_model.tolist(), choice.p_mixed.tolist()
        for row, (token, p_model, p_mixed) in enumerate(zip(tokens, before, after, strict=True)):
            entries: tuple[RetrievedEntry, ...] = ()
            if choice.neighbors is not None:
                if self._mixing is not None and p_mixed > p_model:
                    entries = _mixed_entries(choice.neighbors, row, token, p_mixed, self._mixing)
                elif self._candidates:
                    entries = _agreeing_entries(choice.neighbors, row, token, self._candidates)
            self.traces[first + row].append(
                TokenTrace(choice.row, choice.col, token, p_model, p_mixed, entries)
            )


def _mixed_entries(
    found: Neighbors, row: int, token: int, p_mixed: float, mixing: DaidSettings
) -> tuple[RetrievedEntry, ...]:
    """The entries through which DAiD may have drawn `token`, heaviest first.

    With merge "nearest" those nearest of that token share its weight evenly, with "sum" each has
    its own.
    """
    places = np.flatnonzero(counting(found)[row])
    tokens, distances = found.tokens[row, places], found.distances[row, places].astype(np.float64)
    nearest = distances.min(initial=np.inf)
    shares = found.weights[row, places] * np.exp((nearest - distances) / mixing.tau)
    mine = tokens == token
    if mixing.merge == "sum":
        shares = shares * found.copies[row, places]
        total = shares.sum()
    else:
        order = np.argsort(-shares, kind="stable")  # the first of each token speaks for it
        total = shares[order][np.unique(tokens[order], return_index=True)[1]].sum()
        mine &= shares == shares[mine].max(initial=0)
        shares = shares / max(int(mine.sum()), 1)
    weights = mixing.lam * shares / total / p_mixed
    at = np.flatnonzero(mine)
    at = at[np.argsort(-weights[at], kind="stable")]
    return _entries(found, row, places[at], weights[at])


def _agreeing_entries(
    found: Neighbors, row: int, token: int, candidates: int
) -> tuple[RetrievedEntry, ...]:
    """The entries among FAiD's candidates that offered `token`, nearest first."""
    count = min(int(found.count[row]), candidates)
    at = np.flatnonzero(found.tokens[row, :count] == token)
    return _entries(found, row, at, np.full(len(at), 1 / candidates))


def _entries(
    found: Neighbors, row: int, places: npt.NDArray[Any], weights: npt.NDArray[Any]
) -> tuple[RetrievedEntry, ...]:
    columns = (found.patch_ids, found.distances, found.origin)
    ids, distances, databases = (column[row, places].tolist() for column in columns)
    return tuple(map(RetrievedEntry, ids, distances, weights.tolist(), databases))


def source_weights(trace: Sequence[TokenTrace]) -> dict[SourceImage, float]:
    """The sources behind a picture with their weights summed over it, heaviest first."""
    sums: dict[SourceImage, float] = defaultdict(float)
    for token in trace:
        for entry in token.entries:
            sums[entry.source] += entry.weight
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def heat(trace: Sequence[TokenTrace], height: int, width: int) -> npt.NDArray[np.float64]:
    """How much of each position came from retrieval, 0..1 [h, w]."""
    values = np.zeros((height, width))
    for token in trace:
        values[token.row, token.col] = token.weight
    return values


def trace_json(
    pictures: Sequence[Traced],
    width: int,
    origins: Mapping[SourceImage, ImageRow],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What `--trace` writes: the settings, and for each picture its tokens, sources and copies.

    width: the columns of a token grid.
    """

    def about(source: SourceImage) -> dict[str, str | None]:
        return {name: getattr(origins.get(source), name, None) for name in _ABOUT}

    def entry_json(entry: RetrievedEntry) -> dict[str, Any]:
        row, col = divmod(entry.patch_id % MAX_POSITIONS, width)
        place = {"image_id": entry.source[1], "row": row, "col": col}
        return vars(entry) | place | about(entry.source)

    def token_json(token: TokenTrace) -> dict[str, Any]:
        listed = [entry_json(entry) for entry in token.entries[:_MOST_ENTRIES]]
        left_out = len(token.entries) - len(listed)
        return vars(token) | {"entries": listed, "entries_left_out": left_out}

    images = [
        {
            "prompt": one.prompt,
            "seed": one.seed,
            "retrieved_share": sum(token.weight for token in one.trace) / max(len(one.trace), 1),
            "longest_copy": None if one.copy is None else vars(one.copy),
            "sources": [
                {"database": source[0], "image_id": source[1], "weight": weight} | about(source)
                for source, weight in source_weights(one.trace).items()
            ],
            "tokens": [token_json(token) for token in one.trace],
        }
        for one in pictures
    ]
    return {**settings, "images": images}
