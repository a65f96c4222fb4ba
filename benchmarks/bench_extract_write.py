"""Patches are cut out at 10 million keys a second on one core and stored at a million rows a second.

Claim 1: `stages.encode.extract_patches.extract_patches`, pinned to one core with one thread, makes at
least 10 million (patch id, key, next token) rows a second out of token grids. Beside it, giving
the same numbers: an index gather in numpy as one would write it by hand, and a Python loop on a
few grids.
Claim 2: `stages.tables.committer.write_fragments` with the committer, a fragment and a ledger row a
shard, stores at least a million rows a second. Beside it: pyarrow writing the same tables as
Parquet files, in turns with it.

In: nothing, the grids are random (the worst case for compression). Out: a table, one JSON line,
exit code 1 when a bound is missed. Each figure is the best of several rounds.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Thread pools take their sizes when numpy and pyarrow are imported.
os.environ.update(
    dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
)

import numpy as np
import numpy.typing as npt
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import finish, machine

from arrag_runtime.format.ids import image_id
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.specs import TokenizerSpec, key_spec
from schemas.records import Shard
from stages.encode.extract_patches import extract_patches

KEYS_BOUND, ROWS_BOUND = 10e6, 1e6
SPEC = TokenizerSpec("bench", 384, 24, 24, 16384, 8, "none", "0" * 64)
KEYS = key_spec("causal-1", "skip", "codebook")
Columns = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def by_hand(ids: npt.NDArray[Any], grids: npt.NDArray[Any]) -> Columns:
    """Patch ids, keys and next tokens with numpy's index gather, for this one neighbourhood."""
    rows, cols = (part.reshape(-1) for part in np.mgrid[1:24, 1:23])
    offsets = ((-1, -1), (-1, 0), (-1, 1), (0, -1))
    keys = np.stack([grids[:, rows + down, cols + right] for down, right in offsets], axis=-1)
    return (ids[:, None] << 10) | (rows * 24 + cols), keys, grids[:, rows, cols]


def by_loop(ids: npt.NDArray[Any], grids: npt.NDArray[Any]) -> Columns:
    """The same, position by position."""
    patches, keys, tokens = [], [], []
    for number, grid in zip(ids.tolist(), grids.tolist(), strict=True):
        for row in range(1, 24):
            for col in range(1, 23):
                above = grid[row - 1]
                patches.append(number << 10 | row * 24 + col)
                keys.append((above[col - 1], above[col], above[col + 1], grid[row][col - 1]))
                tokens.append(grid[row][col])
    return np.array(patches), np.array(keys, np.uint16), np.array(tokens, np.uint16)


def best(rounds: int, call: Callable[[], Any]) -> float:
    """The shortest of several timed calls, in seconds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_extract(images: int, rounds: int) -> dict[str, float]:
    """Keys a second of the three ways, on one core."""
    rng = np.random.default_rng(0)
    grids = rng.integers(0, SPEC.vocabulary, (images, 24, 24), np.uint16)
    ids = np.arange(images, dtype=np.int64)
    made = extract_patches(SPEC, KEYS, ids, grids)
    columns = (made["patch_id"].to_numpy(), list_values(made["key"]), made["next_token"].to_numpy())
    few = min(4, images)
    per_image = made.num_rows // images
    for count, other in ((images, by_hand(ids, grids)), (few, by_loop(ids[:few], grids[:few]))):
        for ours, theirs in zip(columns, other, strict=True):
            same = ours[: count * per_image].reshape(-1) == theirs.reshape(-1)
            if not same.all():
                sys.exit(
                    "error: the ways to cut patches out disagree, so their speeds mean nothing"
                )
    return {
        "extract_patches": made.num_rows
        / best(rounds, lambda: extract_patches(SPEC, KEYS, ids, grids)),
        "numpy gather by hand": made.num_rows / best(rounds, lambda: by_hand(ids, grids)),
        "python loop": few * per_image / best(rounds, lambda: by_loop(ids[:few], grids[:few])),
    }


def shard_tables(shards: int, images: int) -> list[tuple[Shard, pa.Table]]:
    """The patches of shards of pictures with random grids."""
    rng = np.random.default_rng(1)
    made = []
    for number in range(shards):
        shard = Shard("bench", f"{number:010x}000000", (str(number),))
        ids = image_id(shard.id, 0) + np.arange(images, dtype=np.int64)
        grids = rng.integers(0, SPEC.vocabulary, (images, 24, 24), np.uint16)
        made.append((shard, extract_patches(SPEC, KEYS, ids, grids)))
    return made


def write_lance(tables: list[tuple[Shard, pa.Table]], images: int, folder: Path) -> float:
    """Seconds to write and commit every shard, the ledger's rows included."""
    import lance

    from arrag_runtime.format.manifest import Layout
    from stages.tables.committer import Committer, ShardResult, create_tables, write_fragments

    layout = Layout(folder)
    create_tables(layout, SPEC, KEYS)
    committer = Committer(layout, KEYS)
    committer.plan([shard for shard, _ in tables])
    path = layout.patches(KEYS)
    started = time.perf_counter()
    for shard, table in tables:
        fragments = {"patches": write_fragments(path, table)}
        result = ShardResult(
            shard.id, shard.source, 1, images, images, 0, table.num_rows, {}, fragments
        )
        committer.commit(result)
    seconds = time.perf_counter() - started
    stored, wanted = lance.dataset(path).count_rows(), sum(table.num_rows for _, table in tables)
    if stored != wanted:
        sys.exit(f"error: {stored} rows stored of {wanted}")
    return seconds


def write_parquet(tables: list[tuple[Shard, pa.Table]], folder: Path) -> float:
    """Seconds to write one Parquet file a shard, with pyarrow's own settings."""
    import pyarrow.parquet as pq

    folder.mkdir()
    started = time.perf_counter()
    for shard, table in tables:
        pq.write_table(table, folder / f"{shard.id}.parquet")
    return time.perf_counter() - started


def measure_write(shards: int, images: int, rounds: int, below: Path | None) -> dict[str, Any]:
    """Rows a second and bytes a row of both, in turns."""
    tables = shard_tables(shards, images)
    rows = sum(table.num_rows for _, table in tables)
    seconds: dict[str, list[float]] = {"Lance, committed": [], "Parquet": []}
    size = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=below) as temporary:
            lance_at, parquet_at = Path(temporary) / "db", Path(temporary) / "parquet"
            seconds["Lance, committed"].append(write_lance(tables, images, lance_at))
            seconds["Parquet"].append(write_parquet(tables, parquet_at))
            for name, folder in (("Lance, committed", lance_at), ("Parquet", parquet_at)):
                files = [path for path in folder.rglob("*") if path.is_file()]
                size[name] = sum(path.stat().st_size for path in files) / rows
                shutil.rmtree(folder)
    return {name: (rows / min(took), size[name]) for name, took in seconds.items()} | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=1000, help="grids cut at a time, and pictures a shard")
    add("--shards", type=int, default=8, help="shards written: fragments and commits")
    add("--rounds", type=int, default=5)
    add("--dir", type=Path, help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    here = machine()
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(all_cores)})
    extracted = measure_extract(args.images, args.rounds)
    os.sched_setaffinity(0, all_cores)
    print(f"{'on one core':24}{'million keys/s':>16}")
    for name, rate in extracted.items():
        print(f"{name:24}{rate / 1e6:16.2f}")
    written = measure_write(args.shards, args.images, args.rounds, args.dir)
    rows = written.pop("rows")
    print(f"{f'{rows:,} rows, all cores':24}{'million rows/s':>16}{'bytes a row':>14}")
    for name, (rate, size) in written.items():
        print(f"{name:24}{rate / 1e6:16.2f}{size:14.1f}")
    keys_rate, rows_rate = extracted["extract_patches"], written["Lance, committed"][0]
    misses = []
    if keys_rate < KEYS_BOUND:
        misses.append(f"{keys_rate / 1e6:.2f} million keys/s, bound {KEYS_BOUND / 1e6:.0f}")
    if rows_rate < ROWS_BOUND:
        misses.append(f"{rows_rate / 1e6:.2f} million rows/s, bound {ROWS_BOUND / 1e6:.0f}")
    found = {
        "keys_per_second": {name: round(rate) for name, rate in extracted.items()},
        "rows_per_second": {name: round(rate) for name, (rate, _) in written.items()},
        "bytes_per_row": {name: round(size, 2) for name, (_, size) in written.items()},
        "rows": rows,
    }
    finish("extract_write", found | here, misses)


if __name__ == "__main__":
    main()
