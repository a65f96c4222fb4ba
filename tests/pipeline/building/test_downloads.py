"""Builds from links: a web with faults, rejects that are tried again, networks that fail."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lance
import pytest

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.manifest import Layout
from arrag_runtime.format.specs import key_spec
from pipeline.build import BuildReport, build
from pipeline.building.shard_worker import WorkerSettings, read_shard, shard_rows
from pipeline.info import info
from pipeline.verify import verify
from schemas.records import Attempt, ImageRecord, Reject, unpack_records
from schemas.settings.build import BuildSettings
from schemas.settings.download import DownloadSettings
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings
from stages.encode.encode_images import EncodeSettings
from stages.sources import open_source
from tests.conftest import jpeg
from tests.worlds.database_rows import all_rows, assert_same_rows
from tests.worlds.link_source import link_settings
from tests.worlds.servers.web import Page, Web, answer, serve, silent

DOWNLOAD = DownloadSettings(threads=8, timeout=3, allow_private_hosts=True)


def settings(database: Path, source: SourceSettings, **changes: object) -> BuildSettings:
    """Build settings for links to this machine."""
    fields: dict[str, object] = {"database": database, "source": source, "download": DOWNLOAD}
    fields["resources"] = RayResources(workers=1)
    return BuildSettings(**fields | changes)  # type: ignore[arg-type]


def pages(count: int) -> dict[str, Page]:
    """Pictures at /0, /1 and so on."""
    return {f"/{n}": answer(jpeg(n, 64, 64)) for n in range(count)}


def reasons(report: BuildReport) -> dict[str, int]:
    return dict(report.rejects)


@pytest.fixture
def web() -> Iterator[Web]:
    """Eight pictures; of the first six two are away, one is slow, one another one, one no picture."""
    with serve(pages(8)) as server:
        server.pages["/1"] = server.pages["/2"] = answer(b"?", "503 Busy")
        server.pages["/3"] = silent
        server.pages["/5"] = answer(b"<html>", Content_Type="image/jpeg")
        yield server


@pytest.fixture
def listed(web: Web, tmp_path: Path) -> Path:
    """A list of the eight with captions, a line without a URL, and the fifth with its sha256."""
    sums = {
        4: hashlib.sha256(b"another").hexdigest(),
        6: hashlib.sha256(jpeg(6, 64, 64)).hexdigest(),
    }
    lines = [f"{web.url(f'/{n}')}\tpicture {n}\t{sums.get(n, '')}" for n in range(8)]
    lines.insert(4, "\tno address")
    path = tmp_path / "links.tsv"
    path.write_text("\n".join(lines))
    return path


def assert_sound(database: Path, inputs: int) -> None:
    """Counts add up, in the ledger's sums and in the tables, and every check passes."""
    fields = info(database)
    assert fields["inputs"] == inputs == fields["images"] + sum(fields["rejects"].values())
    assert lance.dataset(Layout(database).images).count_rows() == fields["images"]
    assert [check for check in verify(database, full=True) if not check.ok] == []


def test_every_link_ends_as_a_row_or_a_reject_and_can_be_tried_again(
    ray_session: None, web: Web, listed: Path, tmp_path: Path
) -> None:
    database = tmp_path / "db"
    source = link_settings(listed, shard_size=5)
    kept = tmp_path / "kept"
    keeping = DownloadSettings(
        threads=8, timeout=3, allow_private_hosts=True, keep_images=str(kept)
    )
    first = build(settings(database, source, download=keeping))
    expected = {"http-5xx": 2, "timeout": 1, "missing": 1, "sha-mismatch": 1, "not-an-image": 1}
    assert (first.inputs, first.images, reasons(first)) == (9, 3, expected)
    assert_sound(database, 9)
    assert info(database)["rejects"] == expected
    before = all_rows(database)
    assert before["images"]["caption"].to_pylist().count("picture 6") == 1

    web.pages["/1"] = answer(jpeg(1, 64, 64))
    web.pages["/3"] = answer(b"?", "404 Not Found")
    asked = len(web.requests)
    again = build(settings(database, source, retry_rejects=("http-5xx", "timeout")))
    assert sorted(web.paths()[asked:]) == ["/1", "/2", "/3"]
    assert (again.inputs, again.images, again.retried) == (0, 1, 3)
    assert reasons(again) == {"http-5xx": 1, "http-404": 1}
    assert_sound(database, 9)
    rejects = expected | {"http-5xx": 1, "http-404": 1}
    del rejects["timeout"]
    assert info(database)["rejects"] == rejects

    after = all_rows(database)
    old = {r["image_id"]: r for r in before["images"].to_pylist()}
    new = {r["image_id"]: r for r in after["images"].to_pylist()}
    assert len(new) == len(old) + 1
    assert {key: new[key] for key in old} == old
    assert sorted(p.suffix for p in kept.iterdir()) == [".tar", ".tar"]

    nothing = build(settings(database, source, retry_rejects=("dns",)))
    assert (nothing.shards_done, nothing.retried) == (0, 0)
    assert build(settings(database, source)).shards_done == 0


@pytest.mark.slow
def test_a_retry_that_was_killed_leaves_nothing(
    ray_session: None, web: Web, listed: Path, tmp_path: Path
) -> None:
    """Whatever its commit reached is dropped by the next build, and the retry can be repeated."""
    database = tmp_path / "db"
    layout = Layout(database)
    source = link_settings(listed)
    build(settings(database, source))
    before = all_rows(database)
    web.pages.update(pages(8))
    web.pages["/2"] = answer(b"?", "503 Busy")
    retry = settings(database, source, retry_rejects=("http-5xx", "timeout"))
    build(retry)
    after = all_rows(database)
    assert after["images"].num_rows == before["images"].num_rows + 2
    assert after["rejects"].num_rows == before["rejects"].num_rows + 1
    lance.dataset(layout.ledger).delete("attempt = 2 AND state = 'done'")
    assert sum(info(database)["rejects"].values()) == 6
    assert not all(check.ok for check in verify(database))
    idle = build(settings(database, source))
    assert (idle.shards_done, idle.notes) == (0, ["dropped 1015 rows that a killed build left"])
    assert_sound(database, 9)
    mended = all_rows(database)
    for name in ("images", "patches", "rejects"):
        assert mended[name].equals(before[name])
    build(retry)
    assert_sound(database, 9)
    assert all_rows(database)["images"].equals(after["images"])
    assert all_rows(database)["patches"].equals(after["patches"])


@pytest.mark.slow
def test_a_network_that_fails_stops_the_shard_and_commits_nothing(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.build.ATTEMPTS", 1)
    path = tmp_path / "links.tsv"
    source = link_settings(path)
    with serve(pages(56)) as web:
        path.write_text("\n".join(web.url(f"/{n}") for n in range(56)))
        web.pages.update(dict.fromkeys(web.pages, answer(b"?", "503 Busy")))
        report = build(settings(tmp_path / "db", source))
        assert report.shards_done == 0
        (error,) = report.failed.values()
        assert "56 of 56 links failed with 'http-5xx' (status 503 Busy)" in error
        assert info(tmp_path / "db")["inputs"] == 0
        web.pages.update(pages(56))
        mended = build(settings(tmp_path / "db", source))
        assert (mended.images, mended.failed) == (56, {})
        build(settings(tmp_path / "other", source))
    assert_same_rows(tmp_path / "other", tmp_path / "db")


def worker(source: SourceSettings, **changes: object) -> WorkerSettings:
    """A worker's settings, as far as reading needs them."""
    return WorkerSettings(
        database="nowhere",
        source=source,
        tokenizer="sample",
        tokenizer_weights=None,
        device="cpu",
        precision="float32",
        compile=False,
        keys=key_spec("causal-1", "skip", "codebook"),
        encode=EncodeSettings(),
        threads=1,
        download=replace(DOWNLOAD, **changes),  # type: ignore[arg-type]
    )


def test_reading_a_shard_again_takes_its_rows_alone(web: Web, listed: Path) -> None:
    """And a shard that fails says why, in a row like others."""
    source = link_settings(listed)
    (shard,) = open_source(source).listing(()).shards
    (rows,) = shard_rows([Attempt(shard, 2, (2, 7, 8))])
    answer = read_shard(rows, worker(source))
    assert answer["error"].to_pylist() == [None]
    items = list(unpack_records(answer["inputs"][0].as_buffer()))
    assert [(item.row, type(item)) for item in items] == [
        (2, Reject),
        (7, ImageRecord),
        (8, ImageRecord),
    ]
    assert sorted(web.paths()) == ["/2", "/6", "/7"]
    for attempt, changes, error in (
        (Attempt(shard, 2, (2, 9)), {}, "has no row 9 any more; its input has changed"),
        (Attempt(shard), {"shard_deadline": 0.1, "threads": 1}, "given up after 0.1 s"),
        (Attempt(shard), {"max_shard_bytes": 100}, "over 100 bytes"),
    ):
        (rows,) = shard_rows([attempt])
        (said,) = read_shard(rows, worker(source, **changes))["error"].to_pylist()
        assert error in said


def test_a_reason_that_no_reject_has_is_refused(tmp_path: Path, listed: Path) -> None:
    with pytest.raises(
        BadInputError, match="'teapot' is no reason of a reject; choose from bad-line, bad-url"
    ):
        build(settings(tmp_path / "db", link_settings(listed), retry_rejects=("teapot",)))
    with pytest.raises(BadInputError, match="no database at"):
        build(settings(tmp_path / "db", link_settings(listed), retry_rejects=("dns",)))
    wrong = DownloadSettings(contact="two words")
    with pytest.raises(BadInputError, match="--user-agent-contact"):
        build(settings(tmp_path / "db", link_settings(listed), download=wrong))
    assert not (tmp_path / "db").exists()
