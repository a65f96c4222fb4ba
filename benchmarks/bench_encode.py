"""Encoding through the pipeline costs at most a tenth of what a bare loop reaches.

Claim 1 (default): after start-up, `pipeline.build.build` commits at least 0.90 times the pictures
a second that a plain decode-and-encode loop reaches on the same pictures, with the same weights
and the same number of CPU threads in all. The loop first tries every batch size, dtype, memory
format and division of its threads on a few pictures and then runs its best float32 and its best
bfloat16 form; the faster of the two is what the pipeline is held against. The loop runs on one
half before the pipeline and on the other half after it, so that a drifting machine hurts both.

The pipeline's time runs from the start of the first shard on any worker to the last commit. A
commit's time less what that shard's worker spent on it is that shard's start; the earliest counts.

Claim 2 (`--device` given): the encode step alone, `stages.encode.encode_images.encode_shard` on JPEG
bytes with random weights, reaches 0.90 of the bare model on tensors that already lie on the device
in channels_last. Needs neither Ray nor Lance nor faiss.

In: a folder of pictures or of tars (claim 1). Out: a table, one JSON line, exit code 1 on a miss.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bare_loop import DTYPES, Array, Bare, best_loops, keep_memory
from figures import cores, finish, machine
from pictures import DATA, read_pictures, synthetic_pictures, write_tars

from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.tokenizers import load_tokenizer
from arrag_runtime.tokenizers.vq16 import VQTokenizer
from schemas.records import ImageRecord
from stages.encode.decode import DecodeSettings, decode_image
from stages.encode.encode_images import EncodedShard, EncodeSettings, encode_shard

BOUND = 0.90
WIDTHS: dict[str, dict[str, Any]] = {
    "full": {"num_embeddings": 16384, "latent_channels": 256, "base_channels": 128},
    "narrow": {"num_embeddings": 4096, "latent_channels": 64, "base_channels": 32},
}


def run_pipeline(args: argparse.Namespace, tars: Path, database: Path) -> dict[str, Any]:
    """Build a database of the tars; rates, and what the workers did with their time."""
    from pipeline.build import BuildReport, build
    from schemas.settings.build import BuildSettings
    from schemas.settings.resources import RayResources
    from schemas.settings.source import SourceSettings

    marks: list[tuple[float, int, float]] = []

    def watch(_total: int, report: BuildReport) -> None:
        busy = sum(spent for name, spent in report.stage_seconds.items() if name != "read")
        marks.append((time.perf_counter(), report.shards_done, busy))

    workers = args.workers or max(1, args.threads // args.worker_threads)
    settings = BuildSettings(
        database=database,
        source=SourceSettings(name="webdataset", input=(str(tars),)),
        tokenizer=args.tokenizer,
        tokenizer_weights=args.tokenizer_weights,
        precision=args.precision,
        batch_size=args.batch_size,
        resources=RayResources(workers=workers, threads=args.worker_threads),
    )
    report = build(settings, watch)
    if report.failed:
        raise ArragError(
            f"{len(report.failed)} shards failed: {next(iter(report.failed.values()))}"
        )
    commits = [(at, busy - before[2]) for before, (at, _, busy) in itertools.pairwise(marks)]
    commits = [(at, busy) for at, busy in commits if busy > 0]
    first = min(at - busy for at, busy in commits)
    seconds = commits[-1][0] - first
    return {
        "rate": report.images / seconds,
        "rate_with_start_up": report.images / report.seconds,
        "workers": workers,
        "idle": 1 - sum(busy for _, busy in commits) / seconds / workers,
        "stages": {name: round(spent, 2) for name, spent in report.stage_seconds.items()},
    }


def pipeline_tokens(database: Path) -> Array:
    """Tokens [N, h · w] of a database whose keys are the pictures' numbers, in their order."""
    import lance

    from arrag_runtime.format.list_columns import list_values

    table = lance.dataset(database / "images.lance").to_table(columns=["key", "tokens"])
    return list_values(table["tokens"])[np.argsort(table["key"].to_numpy(zero_copy_only=False))]


def measure_pipeline(args: argparse.Namespace) -> dict[str, Any]:
    """Claim 1: bare loops on one half, the pipeline on all, bare loops on the other half."""
    pictures = read_pictures(args.data, args.images)
    tokenizer = load_tokenizer(args.tokenizer, args.tokenizer_weights)
    assert isinstance(tokenizer, VQTokenizer)
    bare = Bare(tokenizer)
    kind = args.precision or "float32"
    loops = best_loops(bare, pictures[: args.probe], args.threads, kind)
    half = len(pictures) // 2
    halves = (pictures[:half], pictures[half:])
    runs: dict[str, list[tuple[float, Array]]] = {dtype: [] for dtype in loops}
    with tempfile.TemporaryDirectory() as temporary:
        tars, database = Path(temporary) / "tars", Path(temporary) / "db"
        write_tars(pictures, tars, args.shard_size)
        for turn in range(2):
            for dtype, loop in loops.items():
                runs[dtype].append(bare.run(loop, halves[turn]))
            if turn == 0:
                ran = run_pipeline(args, tars, database)
        stored = pipeline_tokens(database)
    rates = {}
    for dtype, ((one, _), (two, _)) in runs.items():
        rates[dtype] = len(pictures) / (half / one + (len(pictures) - half) / two)
        print(f"bare loop  {rates[dtype]:8.2f} pictures/s   {loops[dtype]}")
    stages = ", ".join(f"{name} {spent:.1f} s" for name, spent in ran["stages"].items())
    print(f"pipeline   {ran['rate']:8.2f} pictures/s   {kind}, {ran['workers']} workers")
    print(
        f"  {stages}; workers idle {ran['idle']:.1%}; with start-up {ran['rate_with_start_up']:.2f}"
    )
    tokens = np.concatenate([part for _, part in runs[kind]]).reshape(len(pictures), -1)
    same = float((tokens == stored).mean())
    print(f"{same:.3%} of the pipeline's ids are the bare {kind} loop's")
    fastest = max(rates, key=lambda dtype: rates[dtype])
    if fastest != kind:
        times = rates[fastest] / rates[kind]
        print(f"{fastest} is {times:.2f}x as fast as {kind} here, and the bound holds against it;")
        print(f"the same precision alone: ratio {ran['rate'] / rates[kind]:.3f}")
    return {
        "ratio": ran["rate"] / rates[fastest],
        "ratio_same_precision": ran["rate"] / rates[kind],
        "bare": {dtype: [round(rates[dtype], 3), str(loops[dtype])] for dtype in rates},
        "pipeline": ran,
        "precision": kind,
        "keep_memory": args.keep_memory,
        "same_ids": same,
        "images": len(pictures),
    }


def random_tokenizer(width: str) -> VQTokenizer:
    """VQ-16 with seeded random weights, at full width or narrow."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    torch.manual_seed(0)
    shape = {"embed_dim": 8, "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2}
    config = JanusVQVAEConfig(**WIDTHS[width], **shape, num_patches=24)
    return VQTokenizer("vq16", JanusVQVAE(config).state_dict(), None, "0" * 64)


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    """Claim 2: the bare model on preloaded tensors and the encode step, in turns."""
    cuda = args.device != "cpu"
    if cuda and not torch.cuda.is_available():
        raise BadInputError(f"--device {args.device}, but torch {torch.__version__} sees no GPU")
    tokenizer, kind = random_tokenizer(args.width), args.precision or "bfloat16"
    bare = Bare(tokenizer, args.device)
    tokenizer.setup(args.device, precision=kind)
    pictures = synthetic_pictures(min(256, args.images))
    size = DecodeSettings(size=tokenizer.spec.image_size)
    pixels = np.stack([decode_image(data, size).pixels for data in pictures])
    loaded = bare.place(pixels, kind, "channels_last")

    def run_bare(batch: int, count: int) -> float:
        cuts = range(0, len(loaded) - batch + 1, batch)
        starts = itertools.islice(itertools.cycle(cuts), max(1, count // batch))
        started = time.perf_counter()
        done = [bare.ids(loaded[at : at + batch], kind, "channels_last") for at in starts]
        done[-1].cpu()
        return len(done) * batch / (time.perf_counter() - started)

    def run_step(batch: int, count: int) -> tuple[float, EncodedShard]:
        rows = (ImageRecord(n, str(n), pictures[n % len(pictures)]) for n in range(count))
        settings = EncodeSettings(batch_size=batch, decode_threads=args.decode_threads, decode=size)
        started = time.perf_counter()
        shard = encode_shard(tokenizer, rows, settings)
        return count / (time.perf_counter() - started), shard

    wanted = [args.batch_size] if args.batch_size else [16, 32, 64, 128] if cuda else [1, 2, 4, 8]
    batches = [batch for batch in wanted if batch <= len(loaded)]
    for batch in batches:
        run_bare(batch, batch)
    batch = max(batches, key=lambda size: run_bare(size, max(4 * size, args.probe)))
    run_step(batch, 2 * batch)
    half = args.images // 2
    one = run_bare(batch, half)
    rate, shard = run_step(batch, args.images)
    base = 2 / (1 / one + 1 / run_bare(batch, half))
    torch.backends.cudnn.allow_tf32 = False
    few = min(64, len(pixels))
    parts = [bare.place(pixels[at : at + 1], "float32", "contiguous") for at in range(few)]
    exact = torch.cat([bare.ids(part, "float32", "contiguous") for part in parts]).cpu().numpy()
    same = float((shard.tokens[:few] == exact).mean())
    print(f"bare model   {base:8.2f} pictures/s   {kind}, channels_last, batch {batch}, preloaded")
    print(f"encode step  {rate:8.2f} pictures/s   {args.decode_threads} threads decode ahead")
    print(f"{same:.3%} of its ids are float32's ({few} pictures, random weights, {args.width})")
    return {
        "ratio": rate / base,
        "bare": round(base, 3),
        "step": round(rate, 3),
        "precision": kind,
        "batch": batch,
        "same_ids_as_float32": same,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "images": args.images,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder or tars")
    add("--images", type=int, help="default 2,000 (a GPU: 8,192)")
    add("--tokenizer", default="sample")
    add("--tokenizer-weights")
    add("--threads", type=int, default=cores(), help="CPU threads in all, for both sides")
    add("--workers", type=int, default=0, help="encode actors; default: --threads over the next")
    add("--worker-threads", type=int, default=1, help="CPU threads an encode actor")
    add("--precision", choices=DTYPES, help="of the pipeline or step; default: its own")
    add("--batch-size", type=int)
    add("--shard-size", type=int, default=100, help="pictures a shard")
    add(
        "--keep-memory",
        action="store_true",
        help="the bare loop's process frees nothing to the kernel",
    )
    add("--probe", type=int, default=24, help="pictures for choosing the loop's form")
    add("--device", help="cpu or cuda: measure the encode step alone")
    add("--width", choices=WIDTHS, default="full", help="of the network, with --device")
    add("--decode-threads", type=int, default=max(2, cores() - 2), help="with --device")
    args = parser.parse_args()
    args.images = args.images or (8192 if (args.device or "cpu") != "cpu" else 2000)
    return args


def main() -> None:
    args = parse()
    here = machine(args.threads)
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        keep_memory()
    try:
        found = measure_step(args) if args.device else measure_pipeline(args)
    except ArragError as error:
        sys.exit(f"error: {error}")
    print(f"ratio {found['ratio']:.3f}, bound {BOUND}")
    misses = [] if found["ratio"] >= BOUND else [f"ratio {found['ratio']:.3f} is below {BOUND}"]
    finish("encode_step" if args.device else "encode", found | here, misses)


if __name__ == "__main__":
    main()
