"""Ten times the pictures take at most eleven times as long, and no more memory in any process.

Claim: `arrag-db build --no-index` over ten times the pictures, in shards of the same size, takes at
most 11 times the wall time, and the largest process of the build (driver, Ray's own, readers,
encoders) peaks at no more than 1.15 times the memory. Both builds start from nothing, in a fresh
database and a Ray session of their own.

A build of a single picture beforehand is the yardstick of what starting up costs; the times are
also given without it. Memory is each process' resident peak (anonymous, file and shared pages), as
the kernel keeps it in VmHWM, read several times a second for every descendant of the command. A
process once seen is followed to its end, also when its parent dies first. Indexing, which is no
part of the claim, is timed apart.

In: a folder of pictures or tars. Out: a table, one JSON line, exit code 1 when a bound is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import cores, finish, machine
from pictures import DATA, read_pictures

from arrag_runtime.format.errors import ArragError

ROOT = Path(__file__).resolve().parent.parent
TIME_BOUND, MEMORY_BOUND = 11.0, 1.15
EVERY = 0.2
"""Seconds between two looks at the processes."""


@dataclass
class Watch:
    """Peaks of a process and all its descendants, kept while they live and after."""

    root: int
    peaks: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    """(process id, start time) → (name, resident peak in bytes)."""
    most_at_once: int = 0

    def look(self) -> None:
        """Find the descendants once and take their peaks."""
        seen: dict[int, tuple[int, int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and (stat := _read(folder / "stat")):
                after = stat.rpartition(")")[2].split()
                seen[int(folder.name)] = (int(after[1]), int(after[19]))
        ours = {pid for pid, (_, began) in seen.items() if (pid, began) in self.peaks}
        ours |= {self.root} & seen.keys()
        while more := {p for p, (parent, _) in seen.items() if parent in ours} - ours:
            ours |= more
        together = 0
        for pid in ours:
            status = _read(Path(f"/proc/{pid}/status"))
            lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            if "VmHWM" not in lines:
                continue
            peak = int(lines["VmHWM"].split()[0]) * 1024
            together += int(lines["RssAnon"].split()[0]) * 1024
            key = (pid, seen[pid][1])
            self.peaks[key] = (_name(pid), max(peak, self.peaks.get(key, ("", 0))[1]))
        self.most_at_once = max(self.most_at_once, together)

    def by_name(self) -> dict[str, int]:
        """The largest peak among the processes of each name, largest first."""
        largest: dict[str, int] = {}
        for name, peak in self.peaks.values():
            largest[name] = max(peak, largest.get(name, 0))
        return dict(sorted(largest.items(), key=lambda item: -item[1]))


def _read(path: Path) -> str:
    """A file of /proc, empty when its process has gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _name(pid: int) -> str:
    """What a process is: Ray's title of a worker, else its program and script."""
    words = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").split()
    if words and words[0].startswith("ray::"):
        return " ".join(words)
    parts = [Path(word).name for word in words[:4] if not word.startswith("-")]
    return " ".join(parts[:2]) if parts else "gone"


def command(words: list[str]) -> tuple[dict[str, Any], float, Watch]:
    """Run one `arrag-db` command; what it printed as JSON, its seconds, its processes' peaks."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "cli", *words], cwd=ROOT, stdout=out, stderr=err
        )
        watch = Watch(child.pid)
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(EVERY):
                watch.look()

        follower = threading.Thread(target=follow)
        follower.start()
        code = child.wait()
        seconds = time.perf_counter() - started
        ended.set()
        follower.join()
        out.seek(0)
        err.seek(0)
        if code:
            told = err.read().strip().splitlines() or ["no reason given"]
            raise ArragError(f"arrag-db {words[0]} ended with {code}: {told[-1]}")
        printed: dict[str, Any] = json.loads(out.read())
        return printed, seconds, watch


def build(folder: Path, database: Path, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """One fresh build of the first `count` pictures, described."""
    words = ["build", "--source", "folder", "--input", str(folder), "--db", str(database)]
    words += ["--limit", str(count), "--shard-size", str(args.shard_size)]
    words += ["--tokenizer", args.tokenizer, "--no-index", "--json", "--quiet"]
    words += ["--precision", args.precision] if args.precision else []
    printed, seconds, watch = command(words)
    peaks = watch.by_name()
    print(
        f"build of {count:,}: {seconds:.1f} s, largest process {max(peaks.values()) / 2**20:.0f} MiB",
        flush=True,
    )
    return {
        "images": printed["images"],
        "seconds": seconds,
        "peak_bytes": max(peaks.values()),
        "peaks": peaks,
        "anonymous_at_once": watch.most_at_once,
    }


def index(database: Path, index_key: str | None) -> dict[str, Any]:
    """Indexing, timed."""
    words = ["index", "--db", str(database), "--json", "--quiet"]
    words += ["--index-key", index_key] if index_key else []
    printed, seconds, watch = command(words)
    peak = max(watch.by_name().values())
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "kind": printed["kind"],
        "keys": printed["keys"],
    }


def show(small: dict[str, Any], large: dict[str, Any], indexes: list[dict[str, Any]]) -> None:
    """The table for people."""
    print(f"{'':44}{small['images']:>12,}{large['images']:>12,}{'ratio':>9}")
    for heading, name in (
        ("build, seconds", "seconds"),
        ("build without start-up, seconds", "without_start_up"),
    ):
        print(f"{heading:44}{small[name]:12.1f}{large[name]:12.1f}{large[name] / small[name]:9.2f}")
    print("peak memory of the largest process, MiB")
    rows = {"any process": (small["peak_bytes"], large["peak_bytes"])}
    for name, peak in list(large["peaks"].items())[:6]:
        if name in small["peaks"]:
            rows[f"  {name[:40]}"] = (small["peaks"][name], peak)
    for name, (before, after) in rows.items():
        print(f"{name:44}{before / 2**20:12.0f}{after / 2**20:12.0f}{after / before:9.2f}")
    for made in indexes:
        size = f"{made['peak_bytes'] / 2**20:.0f} MiB"
        print(f"indexing {made['keys']:,} keys ({made['kind']}): {made['seconds']:.1f} s, {size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=DATA, help="folder of pictures or tars")
    add("--small", type=int, default=200)
    add("--large", type=int, default=2000)
    add("--shard-size", type=int, default=25, help="the same for both builds")
    add("--tokenizer", default="sample")
    add("--precision")
    add("--no-index", action="store_true", help="leave indexing out")
    add("--index-key", help="for both; default: what `arrag-db index` chooses")
    add("--dir", type=Path, help="where to build; default: the system's temporary folder")
    args = parser.parse_args()
    here = machine(cores())
    indexes = []
    try:
        pictures = read_pictures(args.data, args.large)
        with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
            folder, databases = Path(temporary) / "pictures", [Path(temporary) / n for n in "abc"]
            folder.mkdir()
            for number, data in enumerate(pictures):
                (folder / f"{number:08d}.jpg").write_bytes(data)
            start_up = build(folder, databases[0], 1, args)["seconds"]
            small = build(folder, databases[1], args.small, args)
            large = build(folder, databases[2], args.large, args)
            for built in (small, large):
                built["without_start_up"] = built["seconds"] - start_up
            if not args.no_index:
                indexes = [index(database, args.index_key) for database in databases[1:]]
    except ArragError as error:
        sys.exit(f"error: {error}")
    show(small, large, indexes)
    times, allowed = large["seconds"] / small["seconds"], TIME_BOUND * args.large / args.small / 10
    memory = large["peak_bytes"] / small["peak_bytes"]
    misses = []
    if times > allowed:
        misses.append(f"{times:.2f} times as long, bound {allowed:.1f}")
    if memory > MEMORY_BOUND:
        misses.append(f"{memory:.2f} times the memory, bound {MEMORY_BOUND}")
    found = {
        "time_ratio": times,
        "time_ratio_without_start_up": large["without_start_up"] / small["without_start_up"],
        "memory_ratio": memory,
        "small": small,
        "large": large,
        "indexes": indexes,
    }
    finish("scale", found | here, misses)


if __name__ == "__main__":
    main()
