"""The trace of generated tokens, against Bayes' rule by loops; copies, against every displacement."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrag_runtime import Neighbors, daid
from arrag_runtime.daid import DaidSettings
from arrag_runtime.format.ids import patch_ids
from arrag_runtime.format.images import ImageRow
from arrag_runtime.generation.copied_runs import CopyRun, longest_copy
from arrag_runtime.generation.decode_loop import Choice
from arrag_runtime.generation.picture_grid import comparison, grid_picture, save_png
from arrag_runtime.generation.trace import (
    TokenTrace,
    Traced,
    Tracer,
    heat,
    source_weights,
    trace_json,
)
from arrag_runtime.generation.trace_sheet import draw_trace

K, VOCABULARY = 40, 12


def retrieved(seed: int, count: int) -> Neighbors:
    """One row of neighbours from pictures 0..4 with few tokens and many equal distances."""
    rng = np.random.default_rng(seed)
    ids = patch_ids(np.arange(5), np.arange(49)).reshape(-1)
    distances = np.sort(rng.integers(0, 6, K) / 4).astype(np.float32)
    tokens = rng.integers(0, 6, K).astype(np.uint16)
    chosen = rng.choice(ids, K, replace=False)
    return Neighbors.of(tokens[None], distances[None], chosen[None], np.array([count]))


def traced(found: Neighbors | None, token: int, settings: DaidSettings | None) -> TokenTrace:
    """The trace of one token that a loop chose."""
    p = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)).softmax(dim=-1)
    mixed = p if settings is None else daid.mix(p, found, settings)
    tracer = Tracer(1, settings, candidates=0 if settings else 10)
    tracer(0, Choice(2, 3, torch.tensor([token]), p[:, token], mixed[:, token], found))
    return tracer.traces[0][0]


@pytest.mark.parametrize("merge", daid.MERGES)
@pytest.mark.parametrize("token", range(7))
def test_weights_are_the_probability_of_having_come_through_an_entry(
    merge: daid.Merge, token: int
) -> None:
    """λ · share / p(token) by Bayes' rule; all of a token's entries sum to what retrieval gave."""
    settings, found = DaidSettings(lam=0.4, tau=0.5, merge=merge), retrieved(1, 33)
    told = traced(found, token, settings)
    real = [
        (int(t), math.exp(-float(d) / 0.5), int(i))
        for t, d, i in zip(
            found.tokens[0, :33], found.distances[0, :33], found.patch_ids[0, :33], strict=True
        )
    ]
    best = {t: max(share for other, share, _ in real if other == t) for t, _, _ in real}
    if merge == "sum":
        total = sum(share for _, share, _ in real)
        wanted = {i: share / total for t, share, i in real if t == token}
    else:
        nearest = [i for t, share, i in real if t == token and share == best[t]]
        wanted = {i: best[token] / sum(best.values()) / len(nearest) for i in nearest}
    raised = told.p_mixed > told.p_model
    assert raised == (sum(wanted.values()) > told.p_model)
    given = {entry.patch_id: entry.weight for entry in told.entries}
    if raised:
        assert given == pytest.approx(
            {i: 0.4 * share / told.p_mixed for i, share in wanted.items()}, rel=1e-5
        )
        assert told.weight == pytest.approx(
            (told.p_mixed - 0.6 * told.p_model) / told.p_mixed, rel=1e-4
        )
        assert list(given.values()) == sorted(given.values(), reverse=True)
    else:
        assert given == {}


def test_some_tokens_are_raised_and_some_are_not() -> None:
    """The test above sees both sides."""
    told = [traced(retrieved(1, 33), token, DaidSettings(lam=0.4, tau=0.5)) for token in range(7)]
    assert {bool(token.entries) for token in told} == {True, False}


def test_where_nothing_is_retrieved_nothing_is_traced() -> None:
    """Borders, and rows without any neighbour."""
    assert traced(None, 1, DaidSettings(lam=0.4)).entries == ()
    assert traced(retrieved(1, 0), 1, DaidSettings(lam=0.4)).entries == ()


def test_with_faid_the_candidates_that_agree_are_named() -> None:
    """Those among the first ten that offered the token, a tenth each."""
    found = retrieved(2, 8)
    token = int(found.tokens[0, 2])
    told = traced(found, token, None)
    agreeing = [int(found.patch_ids[0, i]) for i in range(8) if found.tokens[0, i] == token]
    assert [entry.patch_id for entry in told.entries] == agreeing
    assert {entry.weight for entry in told.entries} == {0.1}


def traces() -> list[TokenTrace]:
    """A trace of 3 x 3 tokens, at one of which nothing was retrieved."""
    made = []
    for row, col in itertools.product(range(3), range(3)):
        found = None if (row, col) == (0, 0) else retrieved(row * 3 + col, 33)
        token = traced(found, 3, DaidSettings(lam=0.6, tau=0.5, merge="sum"))
        made.append(TokenTrace(row, col, 3, token.p_model, token.p_mixed, token.entries))
    return made


def test_a_sources_weights_are_summed_over_the_picture() -> None:
    """By picture, heaviest first; the heat map holds the same weights by position."""
    trace = traces()
    sums: dict[tuple[int, int], float] = {}
    for token in trace:
        for entry in token.entries:
            source = (0, entry.patch_id >> 10)
            sums[source] = sums.get(source, 0.0) + entry.weight
    assert source_weights(trace) == pytest.approx(sums)
    assert list(source_weights(trace).values()) == sorted(sums.values(), reverse=True)
    values = heat(trace, 3, 3)
    assert values.sum() == pytest.approx(sum(sums.values()))
    assert values[0, 0] == 0


ORIGIN = ImageRow(1, "a.jpg", "folder:x", "a hat", "http://x/a", "CC0", "database", "")


def test_the_json_names_every_entrys_origin(tmp_path: Path) -> None:
    """Picture, place, url, caption, licence and weight; an unknown picture keeps its id."""
    copy, pixels = CopyRun(0, 1, 4, 0, 1, 2, 3, 5), np.zeros((32, 32, 3), np.uint8)
    traced = Traced("a hat", 7, pixels, traces(), copy)
    told = trace_json([traced], 3, {(0, 1): ORIGIN}, {"method": "daid"})
    told = json.loads(json.dumps(told))
    assert (told["method"], len(told["images"])) == ("daid", 1)
    picture = told["images"][0]
    assert (picture["prompt"], picture["seed"]) == ("a hat", 7)
    assert picture["longest_copy"]["length"] == 4
    assert [token["token"] for token in picture["tokens"]] == [3] * 9
    entries = [entry for token in picture["tokens"] for entry in token["entries"]]
    for entry in entries:
        image, position = divmod(entry["patch_id"], 1024)
        assert (entry["image_id"], entry["row"], entry["col"]) == (image, *divmod(position, 3))
        known = image == 1
        assert entry["url"] == ("http://x/a" if known else None)
        assert entry["caption"] == ("a hat" if known else None)
        assert entry["licence"] == ("CC0" if known else None)
    assert {entry["image_id"] == 1 for entry in entries} == {True, False}
    assert picture["sources"][0]["weight"] == max(s["weight"] for s in picture["sources"])


def by_every_displacement(grid: Any, source: Any) -> int:
    """The longest run, one displacement and one position at a time."""
    height, width = grid.shape
    longest = 0
    for down in range(-height + 1, height):
        for right in range(-width + 1, width):
            run = 0
            for row, col in itertools.product(range(height), range(width)):
                at = (row + down, col + right)
                inside = 0 <= at[0] < height and 0 <= at[1] < width
                run = run + 1 if inside and source[at] == grid[row, col] else 0
                longest = max(longest, run)
    return longest


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_copy_is_that_of_every_displacement(seed: int) -> None:
    """Random grids with a few codes, and one with a stretch copied in."""
    rng = np.random.default_rng(seed)
    grid, *sources = rng.integers(0, 4, (4, 5, 6)).astype(np.uint16)
    if seed % 2:
        grid[1:4] = sources[1][2:5]
    found = longest_copy(grid, {(2, n): source for n, source in enumerate(sources)})
    assert found is not None
    assert found.length == max(by_every_displacement(grid, source) for source in sources)
    source = sources[found.image_id]
    flat, theirs = grid.reshape(-1), source.reshape(-1)
    start, other = found.row * 6 + found.col, found.source_row * 6 + found.source_col
    run = slice(start, start + found.length)
    np.testing.assert_array_equal(flat[run], theirs[other : other + found.length])
    assert found.matches >= found.length


def test_a_whole_picture_that_is_copied_is_one_run() -> None:
    """Also over the ends of rows; and none where nothing recurs."""
    grid = np.arange(30, dtype=np.uint16).reshape(5, 6)
    assert longest_copy(grid, {(1, 9): grid}) == CopyRun(1, 9, 30, 0, 0, 0, 0, 30)
    assert longest_copy(grid, {(1, 9): (grid + 100).astype(np.uint16)}) is None
    shifted = np.roll(grid, 1, axis=1)
    found = longest_copy(grid, {(1, 9): shifted})
    assert found is not None
    assert found.length == 5


def test_pictures_are_drawn_and_saved(tmp_path: Path) -> None:
    """Grids, comparisons and sheets hold what they are given; folders are made on the way."""
    pixels = np.zeros((3, 32, 32, 3), np.uint8)
    pixels[1] = (200, 10, 10)
    grid = np.array(grid_picture(pixels))
    assert (grid == (200, 10, 10)).all(axis=2).sum() == 32 * 32
    sheet = np.array(comparison([("plain", pixels), ("DAiD", pixels)], ["a", "b", "c"]))
    assert (sheet == (200, 10, 10)).all(axis=2).sum() == 2 * 32 * 32
    row = Traced("a hat", 7, pixels[1], traces(), CopyRun(0, 1, 4, 0, 1, 2, 3, 5))
    drawn = draw_trace([row, row], (3, 3), {(0, 1): pixels[1]}, {(0, 1): ORIGIN}, "title")
    save_png(drawn, tmp_path / "made" / "sheet.png")
    assert Image.open(tmp_path / "made" / "sheet.png").size == drawn.size
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["sheet.png"]
    red = (np.array(drawn) == (200, 10, 10)).all(axis=2).sum()
    assert red >= 4 * 160 * 160
