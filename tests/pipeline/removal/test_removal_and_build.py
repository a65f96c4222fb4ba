"""Removals and real builds: beside one that runs, and in those that come after."""

import csv
import hashlib
import shutil
from pathlib import Path
from typing import Any

import lance
import pytest

import pipeline.remove
from arrag_runtime.format.manifest import Layout
from arrag_runtime.search.tombstones import Tombstones
from pipeline.build import BuildReport, build
from pipeline.building.shard_worker import WorkerSettings, read_shard, shard_rows
from pipeline.compact import compact
from pipeline.info import info
from pipeline.remove import RemovalRequest, export_list
from pipeline.verify import verify
from schemas.records import Attempt, Reject, unpack_records
from schemas.settings.download import DownloadSettings
from schemas.settings.source import SourceSettings
from stages.encode.encode_images import EncodeSettings
from stages.sources import open_source
from tests.pipeline.conftest import settings
from tests.worlds.database_rows import all_rows
from tests.worlds.removal_world import KEYS, make_database


def remove(database: str | Path, **request: Any) -> None:
    """Remove what a request names."""
    assert pipeline.remove.remove(database, RemovalRequest(**request), why="asked to").images


def visible(database: Path) -> dict[str, str]:
    """The hashes of the pictures that are not hidden, by key."""
    hidden = set(Tombstones(Layout(database)).ids.tolist())
    rows = all_rows(database)["images"].to_pylist()
    return {row["key"]: row["sha256"] for row in rows if row["image_id"] not in hidden}


def wrong(database: Path) -> list[str]:
    return [check.name for check in verify(database, full=True) if not check.ok]


@pytest.mark.slow
def test_a_removal_beside_a_running_build_holds(
    ray_session: None, pictures: Path, tmp_path: Path
) -> None:
    """What is removed does not come in again by copies in shards that are under way already."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, source in enumerate([1, 2, 4, 5, 7, 1, 8, 1, 2, 1]):
        shutil.copy(pictures / f"{source:02}.jpg", folder / f"{number:02}.jpg")
    database = tmp_path / "db"
    removed: list[str] = []

    def remove_one(_total: int, report: BuildReport) -> None:
        if report.shards_done and not removed:
            image = lance.dataset(Layout(database).images).to_table(limit=1).to_pylist()[0]
            removed.append(image["sha256"])
            remove(database, image_ids=(image["image_id"],))

    report = build(settings(database, folder, hold_out=0.0), remove_one)
    assert not report.failed
    held = visible(database)
    assert removed[0] not in held.values()
    every = all_rows(database)["images"]["sha256"].to_pylist()
    assert len(held) == len(every) - every.count(removed[0])
    fields = info(database)
    assert fields["inputs"] == 10
    assert fields["inputs"] == (
        fields["images"] + sum(fields["rejects"].values()) + fields["removed"]
    )
    assert wrong(database) == []
    compact(database)
    assert wrong(database) == []
    assert info(database)["images"] == fields["images"]


@pytest.mark.slow
def test_what_was_removed_stays_out_of_later_builds(
    ray_session: None, copied: Path, pictures: Path, tmp_path: Path
) -> None:
    """Under another name, and in another database that was given the list."""
    remove(copied, where="key = '02.jpg'")
    compact(copied)
    grown = Path(shutil.copytree(pictures, tmp_path / "grown"))
    shutil.copy(pictures / "02.jpg", grown / "a-copy.jpg")
    (grown / "metadata.csv").write_text("file_name,url\n05.jpg,http://a.org/05.jpg\n")
    report = build(settings(copied, grown))
    assert (report.inputs, report.rejects["removed"]) == (1, 1)
    assert wrong(copied) == []
    fields = info(copied)
    assert (fields["removed"], fields["rejects"]["removed"]) == (1, 1)
    assert fields["inputs"] == fields["images"] + sum(fields["rejects"].values()) + 1

    listed = tmp_path / "list.csv"
    export_list(copied, listed)
    with listed.open("a") as file:
        names = listed.read_text().splitlines()[0].replace('"', "").split(",")
        csv.DictWriter(file, names).writerow({"url": "http://a.org/05.jpg", "why": "by address"})
    other = tmp_path / "other"
    first = SourceSettings(name="folder", input=(str(grown),), limit=2, shard_size=2)
    build(settings(other, grown, source=first))
    assert sorted(visible(other)) == ["01.jpg", "02.jpg"]
    remove(other, listed=listed)
    assert sorted(visible(other)) == ["01.jpg"]
    build(settings(other, grown))
    rejects = all_rows(other)["rejects"].to_pylist()
    details = {r["key"]: r["detail"].split()[1] for r in rejects if r["reason"] == "removed"}
    assert details == {"a-copy.jpg": "bytes", "05.jpg": "address"}
    assert wrong(other) == []


def test_a_shard_is_read_without_what_was_removed(tmp_path: Path) -> None:
    """As workers read it, with the list as it stands then."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.jpg").write_bytes(f"bytes of {name}".encode())
    (folder / "metadata.csv").write_text("file_name,url\nb.jpg,http://b.org/\n")
    source = SourceSettings(name="folder", input=(str(folder),))
    [shard] = open_source(source).listing([]).shards
    database = make_database(tmp_path / "db", shards=1)
    worker = worker_settings(database, source)

    def reasons() -> dict[str, str | None]:
        [row] = shard_rows([Attempt(shard)])
        answer = read_shard(row, worker)
        assert answer["error"].to_pylist() == [None]
        items = unpack_records(answer["inputs"][0].as_buffer())
        return {i.key: i.reason if isinstance(i, Reject) else None for i in items}

    assert reasons() == {"a.jpg": None, "b.jpg": None, "c.jpg": None}
    entries = tmp_path / "list.csv"
    digest = hashlib.sha256(b"bytes of c").hexdigest()
    entries.write_text(f"sha256,url\n,http://b.org/\n{digest},\n")
    pipeline.remove.remove(database.root, RemovalRequest(listed=entries), why="asked to")
    assert reasons() == {"a.jpg": None, "b.jpg": "removed", "c.jpg": "removed"}


def worker_settings(layout: Layout, source: SourceSettings) -> WorkerSettings:
    """A worker's settings, of which reading a shard needs the database and the source."""
    return WorkerSettings(
        database=layout.root,
        source=source,
        tokenizer="sample",
        tokenizer_weights=None,
        device="cpu",
        precision="float32",
        compile=False,
        keys=KEYS,
        encode=EncodeSettings(),
        threads=1,
        download=DownloadSettings(),
    )
