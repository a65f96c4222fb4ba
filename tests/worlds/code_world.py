"""Codebook indexes of made-up keys, without a database, and loops to check their answers against."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime import Neighbors, PatchIndex
from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.ids import Ids
from arrag_runtime.format.inverted_lists import CENTROIDS, ListPart
from arrag_runtime.format.manifest import IndexManifest
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.patches import PatchBlock
from arrag_runtime.format.specs import key_spec, key_vectors, normalised
from arrag_runtime.search.codebook_search import CodebookSearch
from arrag_runtime.search.neighbors import EntryTable
from arrag_runtime.search.tombstones import Tombstones
from stages.index.coarse_lists import ListFinder, train_centroids
from stages.index.fill_lists import fill_part, merge_parts

PER_IMAGE = 20


@dataclass(frozen=True)
class CodeWorld:
    """Keys uint16 [N, n] with their next tokens and ids; twenty a picture, in no order."""

    layout: CodeLayout
    keys: npt.NDArray[np.uint16]
    tokens: npt.NDArray[np.uint16]
    ids: Ids

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        return key_vectors(self.keys, self.layout.codes, self.layout.weights)

    def blocks(self, cuts: Sequence[int]) -> list[PatchBlock]:
        """The entries cut at these rows."""
        bounds = [0, *cuts, len(self.ids)]
        return [
            PatchBlock(self.ids[a:b], self.keys[a:b], self.tokens[a:b]) for a, b in pairwise(bounds)
        ]


def make_codes(
    hood: str = "causal-1",
    border: str = "skip",
    vocabulary: int = 24,
    count: int = 400,
    *,
    distinct: int | None = None,
    weights: tuple[float, ...] | None = None,
    seed: int = 0,
) -> CodeWorld:
    """Random keys, a third of them of three tokens; or drawn from so many `distinct` entries."""
    rng = np.random.default_rng(seed)
    spec = key_spec(hood, border, "codebook")
    codes = normalised(rng.normal(size=(vocabulary, 4)))
    keys = rng.integers(0, vocabulary, (count, spec.neighborhood.size)).astype(np.uint16)
    keys[::3] %= 3
    if border == "zero":
        keys[rng.random(keys.shape) < 0.1] = MISSING
    tokens = rng.integers(0, vocabulary, count).astype(np.uint16)
    if distinct is not None:
        # Skewed, so that some stand alone and some have dozens of copies.
        drawn = (distinct * rng.random(count) ** 3).astype(int)
        keys, tokens = keys[drawn], tokens[drawn] % 2
    numbers = np.arange(count, dtype=np.int64)
    ids = (1 + numbers // PER_IMAGE) << 10 | numbers % PER_IMAGE
    return CodeWorld(CodeLayout(spec, codes, weights), keys, tokens, rng.permutation(ids))


def write_codes(
    folder: Path,
    world: CodeWorld,
    lists: int,
    *,
    cuts: Sequence[int] = (),
    max_copies: int = 10**6,
) -> tuple[str, ...]:
    """Write the index's files: a part for each piece between the cuts; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CENTROIDS).exists():
        np.save(folder / CENTROIDS, train_centroids(world.vectors, lists, seed=0))
    centroids = np.load(folder / CENTROIDS)
    names = []
    for number, block in enumerate(world.blocks(cuts)):
        filled = folder / f"fill-{number}"
        finder, keys = ListFinder(centroids), len(block.patch_ids)
        fill_part(filled, [block], finder, world.layout, lists=lists, keys=keys)
        names.append(f"part-{number:04}")
        opened = ListPart.open(filled, world.layout.size)
        merge_parts(folder / names[-1], [opened], world.layout, max_copies=max_copies)
    return tuple(names)


def open_codes(
    folder: Path,
    world: CodeWorld,
    parts: Sequence[str],
    *,
    nprobe: int | None = None,
    tombstones: Tombstones | None = None,
) -> PatchIndex:
    """The index of these parts, opened; it visits all lists unless told otherwise."""
    engine = CodebookSearch(folder, world.layout, parts)
    entries = EntryTable(engine.parts)
    made = IndexManifest(
        name="codes",
        kind="codebook",
        index_key="",
        keys=world.layout.keys,
        table_version=1,
        mark=1,
        count=entries.keys,
        entries=len(entries),
        nprobe=nprobe or engine.lists,
        code_bytes_per_key=0.0,
        resident_bytes_per_key=0.0,
        ms_per_query=0.0,
        recall_at_10=0.0,
        certificate={},
        parts=tuple(parts),
        weights=world.layout.weights,
    )
    return PatchIndex(made, engine, entries, world.layout.codes, tombstones)


def expected_entries(
    world: CodeWorld, *, max_copies: int = 10**6, hidden: frozenset[int] = frozenset()
) -> dict[int, tuple[int, int]]:
    """What may be found, by loops: id → (row, copies). Identical ones beyond `max_copies` are one
    entry of the lowest id that is not hidden; pictures are hidden by id."""
    groups = defaultdict(list)
    for row, (key, token) in enumerate(zip(world.keys.tolist(), world.tokens, strict=True)):
        groups[(*key, int(token))].append(row)
    entries = {}
    for rows in groups.values():
        shown = sorted(
            (int(world.ids[r]), r) for r in rows if int(world.ids[r]) >> 10 not in hidden
        )
        if len(rows) > max_copies:
            for identity, row in shown[:1]:
                entries[identity] = (row, len(shown))
        else:
            entries |= {identity: (row, 1) for identity, row in shown}
    return entries


def check_answer(
    found: Neighbors,
    at: int,
    world: CodeWorld,
    query: npt.NDArray[Any],
    entries: dict[int, tuple[int, int]],
) -> None:
    """One query's results are the nearest entries, with distances to 1e-5, tokens and copies."""
    k = found.tokens.shape[1]
    count = int(found.count[at])
    assert count == min(k, len(entries))
    size, dimension = query.shape[1], world.layout.codes.shape[1]
    weights = world.layout.weights or (1.0,) * size
    plain = key_vectors(query, world.layout.codes).astype(np.float64).reshape(size, dimension)
    rows = key_vectors(world.keys, world.layout.codes).astype(np.float64)
    offsets = ((rows.reshape(-1, size, dimension) - plain) ** 2).sum(axis=2)
    distances = sum(weight * offsets[:, place] for place, weight in enumerate(weights))
    nearest = sorted(distances[row] for row, _ in entries.values())[:k]
    assert np.allclose(found.distances[at, :count], nearest, atol=1e-5)
    ids = found.patch_ids[at, :count].tolist()
    assert len(set(ids)) == count
    for place, identity in enumerate(ids):
        row, copies = entries[identity]
        assert abs(distances[row] - found.distances[at, place]) < 1e-5
        assert found.tokens[at, place] == world.tokens[row]
        assert found.copies[at, place] == copies
    assert (found.patch_ids[at, count:] == -1).all()
    assert np.isinf(found.distances[at, count:]).all()
    assert not found.tokens[at, count:].any()
    assert not found.copies[at, count:].any()
