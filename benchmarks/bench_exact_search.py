"""Exact search over a table as a stream, against the plain way: the k nearest of every block, merged.

Claim: the true 2,048 nearest of 1,000 queries among a million keys are found in a stream in at most the
plain way's time, and the distances are the same. The stream keeps a running k-th distance, so that a
block only sorts what can still enter; the plain way sorts the 2,048 nearest of every block.

In: a database, or made-up keys of skewed tokens. Out: seconds of both and their ratio; one JSON line;
exit code 1 when the stream is slower or the distances differ.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faiss
import numpy as np
from figures import cores, finish, machine

from arrag_runtime.format.errors import ArragError
from arrag_runtime.format.ids import NO_IMAGE
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook
from arrag_runtime.format.patches import BLOCK_ROWS, PatchBlock, PatchTable
from arrag_runtime.format.specs import Floats, key_vectors, normalised
from stages.measure.exact_search import Queries, exact_search
from stages.measure.sample_queries import sample_queries

Blocks = Callable[[], Iterator[PatchBlock]]


def made_up(rows: int, queries: int, seed: int = 0) -> tuple[Blocks, Floats, Queries]:
    """Keys whose tokens are as unevenly frequent as words, and some of them as queries."""
    rng = np.random.default_rng(seed)
    codes = normalised(rng.normal(size=(4096, 8)))
    shares = 1 / np.arange(1, 4097)
    keys = rng.choice(4096, (rows, 4), p=shares / shares.sum()).astype(np.uint16)
    at = rng.choice(rows, queries, replace=False)
    none = np.full((queries, 1), NO_IMAGE)
    asked = Queries(keys[at], keys[at, 0], at, none, f"{queries} of the keys themselves")

    def blocks() -> Iterator[PatchBlock]:
        ids = np.arange(rows)
        for start in range(0, rows, BLOCK_ROWS):
            cut = slice(start, start + BLOCK_ROWS)
            yield PatchBlock(ids[cut], keys[cut], keys[cut, 0])

    return blocks, codes, asked


def of_database(database: str, queries: int) -> tuple[Blocks, Floats, Queries]:
    """The patches of a database, and positions of its held-out pictures as queries."""
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    asked = sample_queries(
        ImageTable(layout.images),
        manifest.tokenizer,
        manifest.keys,
        pictures=200,
        queries=queries,
    )
    return PatchTable(layout.patches(manifest.keys)).blocks, read_codebook(layout), asked


def plainly(blocks: Iterator[PatchBlock], codes: Floats, queries: Queries, k: int) -> Floats:
    """The k smallest distances of every query: those of each block, merged by sorting."""
    vectors = key_vectors(queries.keys, codes)
    best = np.full((len(vectors), k), np.inf, np.float32)
    for block in blocks:
        found, _ = faiss.knn(vectors, key_vectors(block.keys, codes), min(k, len(block.keys)))
        best = np.sort(np.concatenate([best, found], axis=1), axis=1)[:, :k]
    return best


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--db", help="a database; default: made-up keys")
    add("--rows", type=int, default=1_000_000, help="how many keys are made up")
    add("--queries", type=int, default=1000)
    add("-k", type=int, default=2048, help="neighbours a query")
    args = parser.parse_args()
    here = machine(cores())
    try:
        made = of_database(args.db, args.queries) if args.db else made_up(args.rows, args.queries)
    except ArragError as error:
        sys.exit(f"error: {error}")
    blocks, codes, queries = made
    rows = sum(len(block.patch_ids) for block in blocks())
    stream, found = timed(lambda: exact_search(blocks(), codes, queries, args.k))
    plain, expected = timed(lambda: plainly(blocks(), codes, queries, args.k))
    same = np.allclose(found.distances, expected, atol=1e-5)
    print(f"{rows:,} keys, {queries.protocol}, k {args.k:,}")
    print(f"stream {stream:8.1f} s")
    print(f"plain  {plain:8.1f} s   faiss.knn of every block, merged by sorting")
    print(f"ratio  {stream / plain:8.2f}")
    misses = []
    if stream > plain:
        misses.append(f"the stream took {stream / plain:.2f} of the plain way's time")
    if not same:
        misses.append("the distances differ by more than 1e-5")
    figures = {"rows": rows, "stream_s": stream, "plain_s": plain, "ratio": stream / plain}
    finish("exact search", figures | here, misses)


if __name__ == "__main__":
    main()
