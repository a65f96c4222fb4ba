"""Large inputs are streams: what is held at a time does not grow with the file."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from schemas.records import RecordedShard
from tests.worlds.source_cases import open_at, parquet_of, tgz_of

MB = 1 << 20


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Python and numpy may hold at most `limit` bytes more at a time in here."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MB:.0f} MB"


def test_a_list_of_sixty_megabytes(tmp_path: Path) -> None:
    """Listing hashes every line, reading begins at the shard: a few chunks are held."""
    line = b"https://host.example/a-rather-long-path/picture.jpg\t" + b"caption " * 8 + b"\n"
    with (tmp_path / "l.tsv").open("wb") as file:
        for _ in range(50):
            file.write(line * 10_000)
    source = open_at("cc12m", tmp_path / "l.tsv")
    with peak_below(24 * MB):
        shards = source.listing(()).shards
        assert len(shards) == 50
        assert sum(1 for _ in source.read(shards[-1])) == 10_000


@pytest.mark.parametrize("name", ["webdataset", "journeydb"])
def test_an_archive_of_forty_megabytes(tmp_path: Path, name: str) -> None:
    """One sample is held at a time, also while those before the shard are passed over."""
    rng = np.random.default_rng(0)
    files = [(f"000/{n:02}.jpg", rng.bytes(MB)) for n in range(40)]
    path = tgz_of(tmp_path / ("000.tgz" if name == "journeydb" else "000.tar"), files)
    del files
    source = open_at(name, path, shard_size=30)
    (first,) = source.listing(()).shards
    (second,) = source.listing([RecordedShard(first, 30)]).shards
    with peak_below(8 * MB):
        assert sum(1 for _ in source.read(second)) == 10


def test_a_table_with_forty_megabytes_of_pictures(tmp_path: Path) -> None:
    """Rows come a few at a time from the row groups of their shard."""
    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(MB // 8), "id": str(n)} for n in range(320)]
    path = parquet_of(tmp_path / "a.parquet", rows, row_group_size=40, compression="none")
    del rows
    source = open_at("parquet", path)
    shards = source.listing(()).shards
    with peak_below(24 * MB):
        assert sum(1 for _ in source.read(shards[0])) == 320
