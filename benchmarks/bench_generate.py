"""What retrieval costs while pictures are generated: plain, DAiD and FAiD, one after the other.

Claim: on a GPU, with a generator of Janus-Pro-1B's shape and at least a million keys, DAiD costs at
most 1 % and FAiD (folded, two blenders, hops 1 and 2) at most 10 % over plain decoding by our own
eager loop in bfloat16 with the same cache and sampler, at batch 1 and 8, the search included. On a
CPU the shares are reported, and how much of the search's time lies within the forward pass beside
which it runs; where both want the same cores, as on two of them, it slows the forward pass meanwhile.

    python benchmarks/bench_generate.py --db DB                          # the bundled generator
    python benchmarks/bench_generate.py --shape 1b --device cuda         # made-up keys, random weights

In: a database that fits the generator; without --db one is made up of grids that random walks over a
random codebook draw, --images of them at 506 keys each. Out: a row a method and batch; one JSON line;
exit code 1 when a bound is missed. Methods take turns within every round, and a figure is the median
over rounds. With --graph a plain step replayed from a CUDA graph stands beside.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from figures import cores, finish, machine

from arrag_runtime.backends import Backend, load_backend
from arrag_runtime.backends.checkpoint import SAMPLE_GENERATOR
from arrag_runtime.backends.compatibility import require_fit
from arrag_runtime.backends.janus import JanusBackend, JanusDecoding
from arrag_runtime.daid import DaidSettings
from arrag_runtime.faid.attach import attach
from arrag_runtime.generation.decode_loop import Sampling, decode_grids
from arrag_runtime.search.patch_index import PatchIndex
from arrag_runtime.search.retriever import Retriever

BOUNDS = {"daid": 0.01, "faid": 0.10}
PROMPT = "a photo of a t-shirt"
K = {"daid": 2048, "faid": 10}


@dataclass(frozen=True)
class Shape:
    """The widths of a generator with random weights."""

    hidden: int
    inner: int
    layers: int
    heads: int
    codes: int


SHAPES = {
    "1b": Shape(2048, 5632, 24, 16, 16384),
    "narrow": Shape(128, 256, 4, 4, 512),
}


def random_backend(shape: Shape, device: str) -> JanusBackend:
    """A Janus model of this shape with random weights and the bundled generator's text tokenizer."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    words: Any = PreTrainedTokenizerFast.from_pretrained(SAMPLE_GENERATOR)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=1024,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=1, projection_dim=shape.hidden
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=shape.codes,
            base_channels=32,
            projection_dim=shape.hidden,
            image_token_embed_dim=shape.hidden,
        ),
    )
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config)
    model = model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    return JanusBackend(model, words, f"random weights, {shape.hidden} wide")


def made_up(folder: Path, codes: Any, images: int, settings: dict[str, Any]) -> None:
    """A database of random pictures over a codebook, indexed.

    A grid is a random walk: most tokens repeat the one above or to the left, as in pictures, so
    that keys bunch as real ones do.
    """
    from arrag_runtime.format.manifest import (
        DatabaseManifest,
        EncoderSettings,
        Layout,
        write_codebook,
    )
    from arrag_runtime.format.specs import TokenizerSpec, key_spec
    from pipeline.index import index
    from schemas.records import ImageRecord, Shard
    from schemas.settings.index import IndexSettings
    from schemas.tables import REJECTS_SCHEMA
    from stages.encode.encode_images import EncodedImage, EncodedShard
    from stages.encode.extract_patches import extract_patches
    from stages.tables.committer import (
        Committer,
        ShardResult,
        create_tables,
        table_paths,
        write_fragments,
    )

    vocabulary, dimension = codes.shape
    spec = TokenizerSpec("made-up", 384, 24, 24, vocabulary, dimension, "made up", "0" * 64)
    keys = key_spec("causal-1", "skip", "codebook")
    layout = Layout(folder)
    create_tables(layout, spec, keys)
    write_codebook(layout, codes)
    shard = Shard("made-up", f"{1 << 40:016x}", ("all",))
    grids = random_walks(vocabulary, images, np.random.default_rng(0))
    rows = tuple(
        EncodedImage(ImageRecord(i, f"{i}.jpg", b""), 384, 384, f"{i:064x}", held_out=False)
        for i in range(images)
    )
    encoded = EncodedShard(rows, grids, None, (), 0.0, None)
    tables = {
        "patches": extract_patches(spec, keys, encoded.image_ids(shard), grids),
        "rejects": REJECTS_SCHEMA.empty_table(),
        "images": encoded.images_table(spec, shard),
    }
    paths = table_paths(layout, keys)
    fragments = {name: write_fragments(paths[name], table) for name, table in tables.items()}
    committer = Committer(layout, keys)
    committer.plan([shard])
    patches = tables["patches"].num_rows
    result = ShardResult(shard.id, "made-up", 1, images, images, 0, patches, {}, fragments)
    committer.commit(result)
    DatabaseManifest(spec, None, EncoderSettings("cpu", "float32", 1), keys, 0.0).write(layout)
    index(folder, IndexSettings(**settings))


def random_walks(vocabulary: int, images: int, rng: np.random.Generator) -> Any:
    """Grids uint16 [N, 24, 24] in which most tokens repeat the one above or to the left."""
    grids = rng.integers(0, vocabulary, (images, 24, 24)).astype(np.uint16)
    fate = rng.random((images, 24, 24))
    for row in range(24):
        for col in range(24):
            if row:
                above = fate[:, row, col] < 0.3
                grids[above, row, col] = grids[above, row - 1, col]
            if col:
                left = fate[:, row, col] > 0.7
                grids[left, row, col] = grids[left, row, col - 1]
    return grids


class Wrapped:
    """A backend whose decoding of a batch stands behind something else; the latest is `decoding`."""

    def __init__(self, inner: Backend, wrap: Callable[[Any], Any]) -> None:
        self._inner, self._wrap = inner, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, prompts: Any, *, guided: bool) -> Any:
        self.decoding = self._wrap(self._inner.start(prompts, guided=guided))
        return self.decoding


class GraphedDecoding:
    """Replays steps from a CUDA graph: three run eagerly, the fourth is captured."""

    def __init__(self, running: JanusDecoding) -> None:
        self._running, self._steps = running, 0
        self._graph: Any = None
        self._tokens: Any = None
        self._logits: Any = None

    @torch.inference_mode()
    def forward(self, tokens: Any) -> Any:
        self._steps += tokens is not None
        if self._steps <= 3:
            return self._running.forward(tokens)
        if self._graph is None:
            self._tokens = tokens.clone()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._running.forward(self._tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def seconds_of(
    method: str, backend: Backend, index: PatchIndex, batch: int, graphed: bool = False
) -> float:
    """Seconds a step of decoding one batch of pictures."""
    sampling = Sampling(5.0, 1.0, tuple(range(batch)))
    retriever = Retriever(index, K[method]) if method in K else None
    mixing = DaidSettings() if method == "daid" else None
    used: Any = Wrapped(backend, GraphedDecoding) if graphed else backend
    with ExitStack() as stack:
        augmenters = ()
        if method == "faid":
            attached = attach(backend.model)
            stack.callback(attached.detach)
            augmenters = (attached,)  # type: ignore[assignment]
        began = time.perf_counter()
        decode_grids(
            used,
            [PROMPT] * batch,
            sampling,
            retriever=retriever,
            mixing=mixing,
            augmenters=augmenters,
        )
        return (time.perf_counter() - began) / (backend.grid[0] * backend.grid[1])


class Clocked:
    """Stands before something whose one method is called once a step, and notes when it ran."""

    def __init__(self, inner: Any, method: str) -> None:
        self._inner = inner
        self.spans: list[tuple[float, float]] = []
        setattr(self, method, self._clocked(getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _clocked(self, call: Any) -> Any:
        def clocked(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **options)
            self.spans.append((began, time.perf_counter()))
            return result

        return clocked


def overlap(backend: Backend, index: PatchIndex, batch: int) -> float:
    """The share of DAiD's search time that lies within forward passes, over one batch of pictures."""
    searching: Any = Clocked(Retriever(index, K["daid"]), "at")
    watched: Any = Wrapped(backend, lambda decoding: Clocked(decoding, "forward"))
    sampling = Sampling(5.0, 1.0, tuple(range(batch)))
    decode_grids(watched, [PROMPT] * batch, sampling, retriever=searching, mixing=DaidSettings())
    forward: list[tuple[float, float]] = watched.decoding.spans
    inside = total = 0.0
    for (start, end), (first, last) in zip(searching.spans, forward, strict=True):
        inside += max(0.0, min(end, last) - max(start, first))
        total += end - start
    return inside / total


def search_seconds(index: PatchIndex, batch: int, k: int) -> float:
    """Seconds of one step's search alone, median over made-up grids."""
    retriever = Retriever(index, k)
    rng = np.random.default_rng(1)
    times = []
    for _ in range(50):
        grids = random_walks(len(index.codes), batch, rng)
        began = time.perf_counter()
        retriever.at(grids, 12, 11)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(
    backend: Backend, index: PatchIndex, batch: int, rounds: int, graph: bool
) -> dict[str, Any]:
    """Milliseconds a step of every method, medians over rounds, and shares over plain."""
    methods = ["plain", "daid", "faid"]
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(rounds + 1):
        for method in methods[number % 3 :] + methods[: number % 3]:
            seconds = seconds_of(method, backend, index, batch)
            if number:  # the first round warms up
                times[method].append(seconds)
    plain = statistics.median(times["plain"])
    found: dict[str, Any] = {"batch": batch, "plain_ms": plain * 1e3}
    for method in ("daid", "faid"):
        ratios = [a / b - 1 for a, b in zip(times[method], times["plain"], strict=True)]
        alone = search_seconds(index, batch, K[method])
        found |= {
            f"{method}_ms": statistics.median(times[method]) * 1e3,
            f"{method}_share": statistics.median(ratios),
            f"{method}_search_alone_ms": alone * 1e3,
        }
    found["daid_search_within_forward"] = overlap(backend, index, batch)
    if graph:
        found["plain_graph_ms"] = seconds_of("plain", backend, index, batch, graphed=True) * 1e3
    print(
        f"batch {batch}: plain {found['plain_ms']:.2f} ms a step; DAiD {found['daid_share']:+.1%},"
        f" its search alone {found['daid_search_alone_ms']:.2f} ms,"
        f" {found['daid_search_within_forward']:.0%} within forward passes; FAiD {found['faid_share']:+.1%},"
        f" its search alone {found['faid_search_alone_ms']:.2f} ms"
        + (f"; plain from a CUDA graph {found['plain_graph_ms']:.2f} ms" if graph else ""),
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--db", type=Path, help="a database that fits the generator; default: one made up")
    add("--model", default="sample", help="the generator, unless --shape is given")
    add("--shape", choices=SHAPES, help="a generator of this shape with random weights")
    add("--images", type=int, default=2000, help="pictures of the made-up database")
    add("--index-kind", help="kind of the made-up database's index; default: its own choice")
    add("--device", default="cpu")
    add("--batches", type=int, nargs="+", default=[1, 8])
    add("--rounds", type=int, default=5)
    add("--graph", action="store_true", help="with --device cuda: a CUDA graph beside it")
    args = parser.parse_args()
    here = machine(cores())
    if args.shape:
        backend: Any = random_backend(SHAPES[args.shape], args.device)
    else:
        backend = load_backend("janus", args.model, device=args.device)
    with tempfile.TemporaryDirectory() as temporary:
        database = args.db
        if database is None:
            database = Path(temporary) / "db"
            made_up(database, backend.codebook(), args.images, {"kind": args.index_kind})
        index = PatchIndex.open(database)
        require_fit(database, backend)
        print(f"generator {backend.name}; {index.count:,} keys, index {index.manifest.index_key}")
        rows = [
            measure(backend, index, batch, args.rounds, args.graph and args.device != "cpu")
            for batch in args.batches
        ]
    misses = []
    if args.device != "cpu":
        misses = [
            f"{method} costs {row[f'{method}_share']:.1%} at batch {row['batch']}, bound {bound:.0%}"
            for row in rows
            for method, bound in BOUNDS.items()
            if row[f"{method}_share"] > bound
        ]
        if index.count < 1_000_000:
            misses.append(f"{index.count:,} keys; the bounds are for a million")
    found = {"machine": here, "generator": backend.name, "keys": index.count, "rows": rows}
    finish("generate", found, misses)


if __name__ == "__main__":
    main()
