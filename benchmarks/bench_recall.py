"""What an approximate index gives up beside exact search over the same patches.

Claim: the flat index is exact (recall@10 of 1.0 against a scan of the table), and the product
quantiser's recall, time and size stand beside it. Recall is measured as `arrag-db index` measures
it: token keys, of held-out pictures where there are any, against a scan of the whole table.

In: a database. Out: a row an index with recall@10, milliseconds a query, bytes of code and bytes of
files a key; one JSON line; exit code 1 when flat is not exact, or recall is below --min-recall.
The indexes are built beside the database's own and taken away again unless --keep is given.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import cores, finish, machine

from schemas.errors import ArragError
from schemas.manifest import Layout

HEADINGS = ("recall@10", "ms a query", "code bytes", "file bytes", "build s")


def measure(
    database: Path, kind: str, index_key: str | None, nprobe: int | None, keep: bool
) -> dict[str, Any]:
    """Build one index under a name of its own and read its figures off its manifest."""
    from pipeline.index import index_database
    from stages.build_index import IndexSettings

    folder = Path(Layout(database).index(f"bench-{kind}"))
    try:
        made = index_database(
            database, IndexSettings(kind, index_key, nprobe=nprobe), name=folder.name
        )
        files = sum(path.stat().st_size for path in folder.iterdir())
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "index_key": made.index_key,
        "nprobe": made.nprobe,
        "keys": made.count,
        "recall@10": made.recall_at_10,
        "ms a query": made.ms_per_query,
        "code bytes": made.code_bytes_per_key,
        "file bytes": files / made.count,
        "build s": made.recall_protocol["build_seconds"],
        "protocol": made.recall_protocol["queries"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("db", type=Path, help="folder of a database")
    add("--index-key", help="faiss factory string for ivfpq; default: the one for this size")
    add("--nprobe", type=int, help="lists a search visits; default: tuned")
    add("--min-recall", type=float, default=0.0, help="bound on the approximate index's recall@10")
    add("--keep", action="store_true", help="leave the indexes in the database")
    args = parser.parse_args()
    here = machine(cores())
    try:
        flat = measure(args.db, "flat", None, None, args.keep)
        ivfpq = measure(args.db, "ivfpq", args.index_key, args.nprobe, args.keep)
    except ArragError as error:
        sys.exit(f"error: {error}")
    print(f"{flat['keys']:,} keys, {flat['protocol']}")
    print(f"{'index':40}" + "".join(f"{heading:>12}" for heading in HEADINGS))
    for row in (flat, ivfpq):
        name = row["index_key"] + (f", nprobe {row['nprobe']}" if row["nprobe"] else " (exact)")
        print(f"{name:40}" + "".join(f"{row[heading]:12.3f}" for heading in HEADINGS))
    misses = []
    if flat["recall@10"] < 0.9999:
        misses.append(f"flat search found {flat['recall@10']:.4f} of the exact neighbours, not all")
    if ivfpq["recall@10"] < args.min_recall:
        misses.append(f"recall@10 {ivfpq['recall@10']:.3f} is below {args.min_recall}")
    finish("recall", {"flat": flat, "ivfpq": ivfpq} | here, misses)


if __name__ == "__main__":
    main()
