"""Building: counts that add up, adding without renaming, failures that are reported."""

import shutil
import tarfile
import time
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from arrag_runtime.format.errors import BadInputError, DatabaseBusyError, IncompatibleError
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from pipeline.build import BuildReport, build
from pipeline.building.run_shards import VersionCleaner
from pipeline.info import info
from pipeline.resources.lease import lease
from pipeline.verify import verify
from schemas.settings.source import SourceSettings
from schemas.tables import is_held_out
from stages.tables.committer import KEPT_VERSIONS, write_fragments
from stages.tables.ledger import read_ledger
from tests.pipeline.conftest import settings, write_picture
from tests.worlds.database_rows import all_rows, assert_same_rows

PATCHES_PER_IMAGE = 506
PATIENCE = 240.0


def test_every_input_is_a_row_or_a_reject(built: Path) -> None:
    rows = all_rows(built)
    rejects = {r["key"]: r["reason"] for r in rows["rejects"].to_pylist()}
    assert rejects == {"empty.jpg": "empty", "page.jpg": "not-an-image", "half.png": "truncated"}
    assert rows["images"].num_rows == 10
    fields = info(built)
    assert fields["inputs"] == 13 == fields["images"] + sum(fields["rejects"].values())
    captions = {r["key"]: r["caption"] for r in rows["images"].to_pylist()}
    assert captions["01.jpg"] == "a red blob"
    assert captions["04.jpg"] is None


def test_held_out_pictures_have_rows_but_no_patches(built: Path) -> None:
    rows = all_rows(built)
    images = rows["images"].to_pylist()
    held = {r["image_id"] for r in images if is_held_out(r["sha256"], 0.3)}
    assert held == {r["image_id"] for r in images if r["split"] == "heldout"}
    assert 0 < len(held) < len(images)
    owners = set((rows["patches"]["patch_id"].to_numpy() >> 10).tolist())
    assert owners == {r["image_id"] for r in images} - held
    assert rows["patches"].num_rows == len(owners) * PATCHES_PER_IMAGE


def test_a_built_database_verifies(built: Path) -> None:
    assert [c for c in verify(built, full=True) if not c.ok] == []


def test_nothing_to_do_then_one_picture_more(
    ray_session: None, copied: Path, pictures: Path, tmp_path: Path
) -> None:
    again = build(settings(copied, pictures))
    assert (again.shards_done, again.shards_skipped) == (0, 4)
    grown = Path(shutil.copytree(pictures, tmp_path / "elsewhere"))
    write_picture(grown / "00-new.jpg", 99)
    before = all_rows(copied)
    report = build(settings(copied, grown))
    assert (report.shards_done, report.inputs) == (1, 1)
    after = all_rows(copied)
    old = set(before["images"]["image_id"].to_pylist())
    assert old < set(after["images"]["image_id"].to_pylist())
    assert after["images"].num_rows == len(old) + 1


def test_another_number_of_workers_gives_the_same_tables(
    ray_session: None, built: Path, pictures: Path, tmp_path: Path
) -> None:
    from schemas.settings.resources import RayResources

    build(settings(tmp_path / "db", pictures, hold_out=0.3, resources=RayResources(workers=1)))
    assert_same_rows(built, tmp_path / "db")


def test_the_same_file_has_the_same_tokens_through_every_source(
    repeated: tuple[Path, BuildReport],
) -> None:
    database, report = repeated
    assert (report.inputs, report.images, report.rejects) == (3, 2, {"empty": 1})
    tokens = {
        (r["source"], r["key"].removesuffix(".jpg")): r["tokens"]
        for r in all_rows(database)["images"].to_pylist()
    }
    for key in ("01", "05"):
        assert tokens["folder", key] == tokens["webdataset", key]
    assert DatabaseManifest.read(Layout(database)).sources == ("folder", "webdataset")


@pytest.mark.slow
def test_a_long_tar_becomes_several_shards(
    ray_session: None, pictures: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in (1, 2, 4, 5, 7):
            tar.add(pictures / f"{number:02}.jpg")
    source = SourceSettings(name="webdataset", input=(str(tmp_path / "a.tar"),), shard_size=3)
    report = build(settings(tmp_path / "db", pictures, source=source))
    assert (report.shards_done, report.images) == (2, 5)
    assert len(set(all_rows(tmp_path / "db")["images"]["key"].to_pylist())) == 5


def test_the_manifest_keeps_the_options_in_force(built: Path, pictures: Path) -> None:
    """By the names that a file of options has; where the database lies and who asks is left out."""
    kept = DatabaseManifest.read(Layout(built)).runs[0]["settings"]
    assert kept["input"] == [str(pictures)]
    assert (kept["source"], kept["min-side"], kept["workers"]) == ("folder", 32, 2)
    assert not {"db", "user-agent-contact"} & kept.keys()


@pytest.mark.slow
def test_a_failed_shard_is_reported_and_the_others_go_on(
    ray_session: None, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.build.ATTEMPTS", 2)
    tars = tmp_path / "tars"
    tars.mkdir()
    for name in ("a", "b"):
        with tarfile.open(tars / f"{name}.tar", "w") as tar:
            tar.add(pictures / f"0{1 if name == 'a' else 2}.jpg", "x.jpg")
    kept = (tars / "b.tar").read_bytes()

    def lose_a_tar(_total: int, _report: BuildReport) -> None:
        (tars / "b.tar").unlink(missing_ok=True)

    source = SourceSettings(name="webdataset", input=(str(tars),))
    report = build(settings(tmp_path / "db", pictures, source=source), lose_a_tar)
    assert (report.shards_done, len(report.failed)) == (1, 1)
    assert "b.tar" in next(iter(report.failed.values()))
    assert info(tmp_path / "db")["shards_open"] == 1
    (tars / "b.tar").write_bytes(kept)
    again = build(settings(tmp_path / "db", pictures, source=source))
    assert (again.shards_done, again.failed) == (1, {})


def test_rows_without_a_ledger_row_are_dropped(
    ray_session: None, built: Path, pictures: Path, tmp_path: Path
) -> None:
    """What a killed build committed is gone after the next one, whichever tables it reached."""
    database = Path(shutil.copytree(built, tmp_path / "db"))
    layout = Layout(database)
    keys = DatabaseManifest.read(layout).keys
    ledger = lance.dataset(layout.ledger)
    done = ledger.to_table(filter="state = 'done'").to_pylist()
    last = max(done, key=lambda row: row["time"])
    ledger.delete(f"shard = '{last['shard']}' AND state = 'done'")
    report = build(settings(database, pictures))
    assert report.shards_done == 1
    assert any("dropped" in note for note in report.notes)
    assert_same_rows(built, database)
    orphan = lance.dataset(layout.patches(keys)).to_table(limit=5)
    write_fragments(layout.patches(keys), orphan)
    assert build(settings(database, pictures)).shards_done == 0
    assert_same_rows(built, database)


@pytest.mark.slow
def test_latent_keys_and_zero_borders(ray_session: None, pictures: Path, tmp_path: Path) -> None:
    database = tmp_path / "db"
    source = SourceSettings(name="folder", input=(str(pictures),), limit=2)
    changes = {"neighborhood": "surround-1", "border": "zero", "key_space": "latent"}
    build(settings(database, pictures, source=source, **changes))
    rows = all_rows(database)
    assert rows["patches"].num_rows == 2 * 576
    assert rows["patches"].schema.field("key").type.list_size == 8 * 8
    assert [c for c in verify(database, full=True) if not c.ok] == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"neighborhood": "causal-2"}, ("causal-1", "causal-2")),
        ({"border": "zero"}, ("skip", "zero")),
        ({"key_space": "latent"}, ("codebook", "latent")),
        ({"hold_out": 0.5}, ("0.3", "0.5")),
        ({"batch_size": 8}, ("1", "8")),
        ({"precision": "bfloat16"}, ("float32", "bfloat16")),
    ],
)
def test_settings_that_differ_from_the_database_are_refused(
    built: Path, pictures: Path, changes: dict[str, object], named: tuple[str, str]
) -> None:
    with pytest.raises(IncompatibleError) as error:
        build(settings(built, pictures, **changes))
    assert all(name in str(error.value) for name in named)
    assert "\n" not in str(error.value)


def test_a_busy_database_is_refused_and_the_holder_named(built: Path, pictures: Path) -> None:
    with (
        lease(Layout(built), "arrag-db index"),
        pytest.raises(DatabaseBusyError, match="arrag-db index"),
    ):
        build(settings(built, pictures))


def test_a_folder_of_other_things_is_not_written_to(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match=r"thesis\.txt"):
        build(settings(tmp_path, pictures))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_ledger_marks_cover_every_fragment(built: Path) -> None:
    layout = Layout(built)
    state = read_ledger(layout)
    patches = lance.dataset(layout.patches(DatabaseManifest.read(layout).keys))
    assert max(f.fragment_id for f in patches.get_fragments()) == state.marks["patches"]


def test_old_versions_are_deleted_while_the_build_goes_on(
    ray_session: None, tmp_path: Path
) -> None:
    """By a worker: the caller does not wait, and a second request beside the first is no other."""
    path = str(tmp_path / "t.lance")
    for _ in range(KEPT_VERSIONS + 5):
        lance.write_dataset(pa.table({"x": [1]}), path, mode="append")
    clean = VersionCleaner()
    for _ in range(3):
        clean([path])
    end = time.monotonic() + PATIENCE
    while len(lance.dataset(path).versions()) > KEPT_VERSIONS and time.monotonic() < end:
        time.sleep(0.1)
    assert len(lance.dataset(path).versions()) == KEPT_VERSIONS
    assert lance.dataset(path).count_rows() == KEPT_VERSIONS + 5
