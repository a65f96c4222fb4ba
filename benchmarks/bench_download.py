"""Downloads with all guards on are at least as fast as plain img2dataset.

Claim: `stages.download.download_links.download_links`, packing included, fetches small pictures from a local
server in no more time than img2dataset's own command with as many threads in its one process takes,
from the same server in the same run.

img2dataset runs as its users run it (`img2dataset.download` to webdataset tars), at its fastest:
nothing decoded, no EXIF, no hashes. Its time is what its own statistics say of its shards, without
the start of its process; ours is taken around the same shards, in a process of its own too, with
addresses checked (loopback being allowed), bytes, redirects and seconds bounded, and every body
hashed and compared. Both respect X-Robots-Tag. The sides take turns, and each one's best round
counts.

In: nothing, the pictures are made up. Out: a table, one JSON line, exit code 1 when ours is slower.
"""

import argparse
import asyncio
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures import finish, machine

from schemas.records import Attempt, ImageRecord, LinkRecord, Shard, pack_records
from schemas.settings.download import DownloadSettings
from stages.download.download_links import download_links
from stages.download.engine import load_engine

SHARD = 10_000
KINDS = 200
SERVERS = 2


def pictures() -> list[bytes]:
    """Small JPEG files of 13 KB, the same ones every time."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(KINDS):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((256, 192), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
        made.append(stream.getvalue())
    return made


class Answers(asyncio.Protocol):
    """Answers any request with the picture whose number the path names, as fast as may be."""

    answers: tuple[bytes, ...] = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.Transport)
        number = int(data[5 : data.index(b" ", 5)])
        self.transport.write(self.answers[number % KINDS])
        self.transport.close()


def serve(ready: Connection) -> None:
    """A server in a process of its own; sends its port."""
    head = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"
    Answers.answers = tuple(head.format(len(data)).encode() + data for data in pictures())

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Answers, "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def run_plain(urls: list[str], threads: int, folder: Path) -> dict[str, float]:
    """Seconds and successes of img2dataset's shards, by its own statistics."""
    import img2dataset

    listed, output = folder / "urls.txt", folder / "out"
    listed.write_text("\n".join(urls))
    img2dataset.download(
        url_list=str(listed),
        output_folder=str(output),
        processes_count=1,
        thread_count=threads,
        number_sample_per_shard=SHARD,
        output_format="webdataset",
        resize_mode="no",
        disable_all_reencoding=True,
        extract_exif=False,
        compute_hash=None,
        enable_wandb=False,
    )
    stats = [json.loads(path.read_text()) for path in sorted(output.glob("*_stats.json"))]
    return {
        "seconds": sum(s["end_time"] - s["start_time"] for s in stats),
        "fetched": sum(s["successes"] for s in stats),
    }


def run_ours(urls: list[str], threads: int) -> dict[str, float]:
    """Seconds and successes of our shards, from the list of links to the packed shard."""
    load_engine()
    sums = [hashlib.sha256(data).hexdigest() for data in pictures()]
    settings = DownloadSettings(threads=threads, allow_private_hosts=True)
    seconds, fetched = 0.0, 0
    for start in range(0, len(urls), SHARD):
        links = [
            LinkRecord(row, str(row), url, sha256=sums[int(url.rpartition("/")[2]) % KINDS])
            for row, url in enumerate(urls[start : start + SHARD])
        ]
        counts = [0]
        started = time.perf_counter()
        found = download_links(links, settings, Attempt(Shard("bench", f"{start:016x}", ())))
        pack_records(_counted(found, counts))
        seconds += time.perf_counter() - started
        fetched += counts[0]
    return {"seconds": seconds, "fetched": fetched}


def _counted(items: Any, counts: list[int]) -> Any:
    for item in items:
        counts[0] += isinstance(item, ImageRecord)
        yield item


def run_side(side: str, urls: Path, threads: int) -> dict[str, float]:
    """One round of a side in a fresh process; what img2dataset says to the terminal is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        words = [sys.executable, __file__, "--side", side, "--urls", str(urls), "--found"]
        words += [str(found), "--threads", str(threads)]
        environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "TMPDIR": folder}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if not found.exists():
            sys.exit(f"bench_download: the side '{side}' failed: {done.stderr[-500:]}")
        result: dict[str, float] = json.loads(found.read_text())
        return result


def main() -> None:
    """Run both sides in turns and compare their best rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("plain", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--urls", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        urls = given.urls.read_text().split()
        if given.side == "ours":
            figures = run_ours(urls, given.threads)
        else:
            figures = run_plain(urls, given.threads, given.found.parent)
        given.found.write_text(json.dumps(figures))
        return
    here = machine()
    context = multiprocessing.get_context("spawn")
    servers, ports = [], []
    for _ in range(SERVERS):
        parent, child = context.Pipe()
        servers.append(context.Process(target=serve, args=(child,), daemon=True))
        servers[-1].start()
        ports.append(parent.recv())
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    misses = []
    with tempfile.TemporaryDirectory() as folder:
        urls = Path(folder) / "urls.txt"
        count = given.pictures
        urls.write_text(
            "\n".join(f"http://127.0.0.1:{ports[n % SERVERS]}/{n}" for n in range(count))
        )
        for number in range(given.rounds):
            for side in ("plain", "ours") if number % 2 == 0 else ("ours", "plain"):
                found = run_side(side, urls, given.threads)
                times[side].append(found["seconds"])
                rate = count / found["seconds"]
                print(f"round {number} {side:>5}: {found['seconds']:6.1f} s, {rate:6.0f} URLs/s")
                if found["fetched"] != count:
                    misses.append(f"{side} fetched {found['fetched']} of {count}")
    for server in servers:
        server.terminate()
    ratio = min(times["plain"]) / min(times["ours"])
    print(f"ours is {ratio:.2f} times as fast as plain img2dataset ({given.threads} threads)")
    if ratio < 1:
        misses.append(f"{ratio:.2f} of img2dataset's rate, at least 1 is asked")
    found_all = {"machine": here, "pictures": count, "threads": given.threads, "seconds": times}
    finish("download", found_all | {"ratio": ratio}, misses)


if __name__ == "__main__":
    main()
