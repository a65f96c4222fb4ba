"""How soon a picture that is removed stops being found, by a process that searches all the time.

Claim: with one picture of a thousand removed by `arrag-db remove`, it takes under a second from
giving the command until another process' searches no longer return anything of it. The searching
process has its index open all along and asks with the picture's own keys, again and again.

In: nothing; a database of random grids is made in a temporary folder. Out: seconds from the command
to the first search without the picture, the command's own share of it, and the same for a
compaction; one JSON line; exit code 1 when the median of the removals is not under --bound.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import finish, machine

from arrag_runtime.format.manifest import DatabaseManifest, EncoderSettings, Layout, write_codebook
from arrag_runtime.format.specs import TokenizerSpec, key_spec, normalised
from schemas.records import ImageRecord, Shard
from stages.encode.encode_images import EncodedImage, EncodedShard
from stages.encode.extract_patches import extract_patches
from stages.tables.committer import (
    Committer,
    ShardResult,
    create_tables,
    table_paths,
    write_fragments,
)

ROOT = Path(__file__).resolve().parent.parent
SPEC = TokenizerSpec("random", 384, 24, 24, 4096, 8, "none", "0" * 64)
KEYS = key_spec("causal-1", "skip", "codebook")
PER_SHARD = 100
SEARCHER = """
import sys, time
import numpy as np
from arrag_runtime import PatchIndex
index = PatchIndex.open(sys.argv[1])
grids = np.load(sys.argv[2])
for line in sys.stdin:
    number, image = map(int, line.split())
    keys = index.manifest.keys.neighborhood.keys(grids[number][None])[0][:8]
    finds = 0
    while (index.search(keys, 10).patch_ids >> 10 == image).any():
        finds += 1
        if finds == 1:
            print("found", flush=True)
        time.sleep(0.01)
    print(time.time() if finds else "never found", flush=True)
"""


def make(layout: Layout, images: int) -> tuple[npt.NDArray[Any], list[int]]:
    """A database of random grids, as a build leaves it; the grids and the pictures' ids."""
    rng = np.random.default_rng(0)
    grids = rng.integers(0, SPEC.vocabulary, (images, 24, 24)).astype(np.uint16)
    create_tables(layout, SPEC, KEYS)
    write_codebook(layout, normalised(rng.normal(size=(SPEC.vocabulary, 8))))
    DatabaseManifest(SPEC, None, EncoderSettings("cpu", "float32", 1), KEYS, 0.0).write(layout)
    committer = Committer(layout, KEYS)
    ids: list[int] = []
    for start in range(0, images, PER_SHARD):
        shard = Shard("random", f"{start + 1 << 40:016x}", ("member",))
        here = grids[start : start + PER_SHARD]
        known = tuple(_image(row, start + row) for row in range(len(here)))
        encoded = EncodedShard(known, here, None, (), 0.0, None)
        ids += encoded.image_ids(shard).tolist()
        patches = extract_patches(SPEC, KEYS, encoded.image_ids(shard), here)
        tables = {"patches": patches, "images": encoded.images_table(SPEC, shard)}
        paths = table_paths(layout, KEYS)
        written = {name: write_fragments(paths[name], table) for name, table in tables.items()}
        counts = (len(here), len(here), 0, len(patches))
        committer.plan([shard])
        committer.commit(ShardResult(shard.id, shard.source, 1, *counts, {}, written))
    return grids, ids


def _image(row: int, number: int) -> EncodedImage:
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    record = ImageRecord(row, f"{number}.jpg", b"", url=f"http://example.org/{number}.jpg")
    return EncodedImage(record, 640, 480, sha256, False)


def seconds_until_hidden(
    searcher: "subprocess.Popen[str]", database: str, number: int, image: int
) -> tuple[float, float]:
    """From giving the command to the first search without the picture; and to the command's end."""
    assert searcher.stdin is not None
    assert searcher.stdout is not None
    searcher.stdin.write(f"{number} {image}\n")
    searcher.stdin.flush()
    searcher.stdout.readline()
    command = [sys.executable, str(ROOT / "cli.py"), "remove", "--db", database]
    command += ["--image-id", str(image), "--why", "benchmark", "--yes"]
    started = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    ended = time.time() - started
    return float(searcher.stdout.readline()) - started, ended


def measure(images: int, removals: int) -> dict[str, Any]:
    from pipeline.compact import compact
    from pipeline.index import index
    from schemas.settings.index import IndexSettings

    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder) / "db")
        grids, ids = make(layout, images)
        np.save(Path(folder) / "grids.npy", grids)
        index(layout.root, IndexSettings())
        search = [sys.executable, "-c", SEARCHER, layout.root, str(Path(folder) / "grids.npy")]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        chosen = np.random.default_rng(1).choice(images, removals, replace=False).tolist()
        with subprocess.Popen(search, cwd=ROOT, **pipes) as searcher:
            took = [
                seconds_until_hidden(searcher, layout.root, number, ids[number])
                for number in chosen
            ]
            assert searcher.stdin is not None
            searcher.stdin.close()
        started = time.perf_counter()
        compact(layout.root)
        compacted = time.perf_counter() - started
    hidden, ended = np.array(took).T
    return {
        "images": images,
        "removals": removals,
        "hidden_s": np.median(hidden),
        "hidden_longest_s": hidden.max(),
        "command_s": np.median(ended),
        "compact_s": compacted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=1000, help="pictures in the database")
    add("--removals", type=int, default=5, help="pictures that are removed, one after the other")
    add("--bound", type=float, default=1.0, help="seconds from the command to the last finding")
    args = parser.parse_args()
    here = machine()
    found = measure(args.images, args.removals)
    print(
        f"{found['images']:,} pictures: hidden {found['hidden_s']:.2f} s after the command is given"
        f" (longest {found['hidden_longest_s']:.2f} s of {found['removals']}), which ends after"
        f" {found['command_s']:.2f} s; compaction with its index {found['compact_s']:.1f} s"
    )
    late = found["hidden_s"] >= args.bound
    misses = [f"hidden after {found['hidden_s']:.2f} s, not under {args.bound} s"] if late else []
    finish("remove", found | here, misses)


if __name__ == "__main__":
    main()
