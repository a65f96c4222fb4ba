"""A driver needs no more memory for a hundred times the shards.

Claim: the peak of the driver's memory (the process of `arrag-db build`, Ray's client in it included)
over 10,000 shards is at most 1.1 times that over 100. The shards are without pixels: workers write
one row a table and shard and return at once, everything else is the build as it is: plan, ledger,
Ray Data, four commits a shard. Memory is the kernel's VmHWM of the driver.

In: nothing. Out: a table, one JSON line, exit code 1 when the bound is missed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import finish, machine

BOUND = 1.1
EVERY = 100
"""Shards between two looks at the memory, to show how it grows."""


def peak_bytes() -> int:
    """The resident peak of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def child(database: Path, shards: int) -> None:
    """Build in this process and print what it took."""
    from blank_shards import as_line, build_blank

    seen: dict[int, int] = {}

    def look(_total: int, report: Any) -> None:
        if report.shards_done % EVERY == 0:
            seen.setdefault(report.shards_done, peak_bytes() >> 20)

    started = time.perf_counter()
    report = build_blank(str(database), shards, progress=look)
    found = {"shards": report.shards_done, "failed": len(report.failed), "peak": peak_bytes()}
    print(as_line(found | {"seconds": time.perf_counter() - started, "seen": seen}), flush=True)


def measure(shards: int) -> dict[str, Any]:
    """One build in a process of its own."""
    import json

    with tempfile.TemporaryDirectory(prefix="arrag-bench-") as folder:
        command = [sys.executable, __file__, "--child", str(Path(folder) / "db")]
        run = subprocess.run(
            [*command, "--shards", str(shards)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    [line] = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.shards[0])
        return
    here = machine()
    runs = []
    for shards in options.shards:
        found = measure(shards)
        runs.append(found)
        each = found["seconds"] / found["shards"]
        print(
            f"{found['shards']:>7,} shards: driver peak {found['peak'] / 2**20:.0f} MiB,"
            f" {found['seconds']:.0f} s, {1000 * each:.0f} ms a shard",
            flush=True,
        )
        for done, mebibytes in found["seen"].items():
            print(f"        after {int(done):>6,}: {mebibytes} MiB")
    ratio = runs[-1]["peak"] / runs[0]["peak"]
    print(f"{ratio:.2f} times the memory for {options.shards[-1] / options.shards[0]:.0f} times")
    misses = [f"{run['failed']} shards failed" for run in runs if run["failed"]]
    if ratio > BOUND:
        misses.append(f"{ratio:.2f} times the memory, more than {BOUND}")
    finish("driver_memory", {"machine": here, "runs": runs, "ratio": ratio}, misses)


if __name__ == "__main__":
    main()
