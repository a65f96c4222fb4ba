"""How long a plan takes where counts stand in the footers of Parquet files.

Writes metadata with DataComp's columns (by default 70 million rows in 1,400 files, about the shape
its publisher ships) to a temporary folder, then runs `arrag-db plan` on it as a user does, start of
Python included. Exits with 1 when the plan takes longer than `--seconds`, or counts wrongly.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from figures import finish, machine

ROOT = Path(__file__).resolve().parent.parent


def write_metadata(folder: Path, files: int, rows: int) -> None:
    """Files of `rows` rows each; constant columns keep them small, footers are as usual."""
    for number in range(files):
        columns = {
            "uid": pa.repeat(f"{number:032x}", rows),
            "url": pa.repeat(f"https://example.org/{number}.jpg", rows),
            "text": pa.repeat("a caption", rows),
            "original_width": pa.repeat(pa.scalar(640, pa.int64()), rows),
            "original_height": pa.repeat(pa.scalar(480, pa.int64()), rows),
            "clip_b32_similarity_score": pa.repeat(pa.scalar(0.2, pa.float32()), rows),
            "clip_l14_similarity_score": pa.repeat(pa.scalar(0.3, pa.float32()), rows),
            "face_bboxes": pa.array(
                [[[0.1, 0.1, 0.2, 0.2]]] * rows, pa.list_(pa.list_(pa.float64()))
            ),
            "sha256": pa.repeat(f"{number:064x}", rows),
        }
        pq.write_table(pa.table(columns), folder / f"{number:05}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1400)
    parser.add_argument("--rows", type=int, default=50_000, help="Rows a file.")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    here = machine()
    words = ["-m", "cli", "plan", "--source", "datacomp", "--json", "--input"]
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        write_metadata(Path(folder), options.files, options.rows)
        times = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, *words, folder],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            )
            times.append(time.perf_counter() - started)
    found = json.loads(done.stdout)
    wanted = options.files * options.rows
    misses = []
    if not (found["inputs"] == wanted and found["exact"]):
        misses.append(f"the plan counts {found['inputs']:,} rows of {wanted:,}")
    if min(times) > options.seconds:
        misses.append(f"{min(times):.2f} s, more than {options.seconds:g}")
    listed = ", ".join(f"{seconds:.2f}" for seconds in times)
    print(f"{options.files:,} files, {wanted:,} rows: {listed} s (bound {options.seconds:g} s)")
    finish("plan", {"rows": wanted, "seconds": times, "machine": here}, misses)


if __name__ == "__main__":
    main()
