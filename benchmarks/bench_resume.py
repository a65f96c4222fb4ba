"""A build that goes on after 1,000 shards is at its next one within 15 seconds.

Claim: from the start of the command to the moment when a worker begins to read the first new shard,
a build that finds 1,000 committed shards takes at most 15 seconds: starting Python and Ray, taking
the lease, reading the ledger, listing what is left, recovering the tables. The committed shards are
made by the committer as a build makes them, of one picture each; their contents cost nothing, their
number is what is measured. The database may also be in a bucket (`--db s3://…`).

In: nothing. Out: the seconds, one JSON line, exit code 1 when the bound is missed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import finish, machine

BOUND = 15.0
NEW = 4
"""Shards left to do."""


def prepare(database: str, shards: int) -> None:
    """A database whose ledger has this many shards done, and `NEW` more only planned."""
    from blank_shards import blank_shard, blank_writer

    from arrag_runtime.format.manifest import Layout
    from pipeline.resources.lease import lease
    from stages.tables.committer import Committer

    layout = Layout(database)
    keys, write = blank_writer(layout)
    every = [blank_shard(number) for number in range(shards + NEW)]
    with lease(layout, "bench_resume") as held:
        committer = Committer(layout, keys, held.check)
        committer.plan(every)
        for shard in every[:shards]:
            committer.commit(write(shard.id))


def child(database: str, shards: int, mark: Path) -> None:
    """The build that goes on."""
    from blank_shards import build_blank

    report = build_blank(database, shards + NEW, mark=str(mark))
    assert (report.shards_skipped, report.shards_done) == (shards, NEW), report


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--db", help="where the database is made; by default a temporary folder")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.db, options.shards, options.child)
        return
    here = machine()
    with tempfile.TemporaryDirectory(prefix="arrag-bench-") as folder:
        database = options.db or f"{folder}/db"
        mark = Path(folder) / "first"
        began = time.time()
        prepare(database, options.shards)
        print(f"{options.shards:,} shards committed in {time.time() - began:.0f} s", flush=True)
        command = [sys.executable, __file__, "--db", database, "--shards", str(options.shards)]
        started = time.time()
        subprocess.run([*command, "--child", str(mark)], check=True)
        ended = time.time()
        first = float(mark.read_text())
    seconds, whole = first - started, ended - started
    print(
        f"the first new shard is begun after {seconds:.1f} s; all {NEW} are done in {whole:.1f} s"
    )
    misses = [] if seconds <= BOUND else [f"{seconds:.1f} s, more than {BOUND:.0f}"]
    found = {"machine": here, "shards": options.shards, "seconds": seconds, "whole": whole}
    finish("resume", found, misses)


if __name__ == "__main__":
    main()
