"""Training sets on real Ray, Lance and faiss: what is retrieved, what is excluded, resume, export."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.manifest import DatabaseManifest, Layout, read_codebook
from arrag_runtime.format.neighborhood import CAUSAL_1, MISSING
from arrag_runtime.format.specs import key_vectors
from arrag_runtime.format.training_set import TrainingSet
from pipeline.index import index
from pipeline.remove import RemovalRequest, carry_out, plan_removal
from pipeline.trainset import make as exporting
from pipeline.trainset import make as trainset
from pipeline.trainset.make import TrainsetReport, export_trainset, make_trainset
from schemas.settings.index import IndexSettings
from schemas.settings.source import SourceSettings
from schemas.settings.trainset import TrainsetSettings
from stages.tables.row_table import RowTable
from tests.pipeline.conftest import write_picture
from tests.worlds.captioned_world import make_captioned
from tests.worlds.command_line import run

K = 3


@pytest.fixture(scope="module")
def database(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, six of them twice, two without a caption, a third held out; indexed."""
    return make_captioned(tmp_path_factory.mktemp("captioned") / "db")


def rows_of(report: TrainsetReport) -> pa.Table:
    table = lance.dataset(f"{report.folder}/rows.lance").to_table()
    return table.sort_by("image_id").replace_schema_metadata(None)


def images_of(database: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = lance.dataset(database / "images.lance").to_table().to_pylist()
    return rows


def check_row(row: dict[str, Any], database: Path) -> None:
    """Every position's tokens are those of the nearest entries that are not of the same bytes."""
    layout = Layout(database)
    spec, codes = DatabaseManifest.read(layout).tokenizer, read_codebook(layout)
    others = [
        np.array(image["tokens"], np.uint16)
        for image in images_of(database)
        if image["split"] == "database" and image["sha256"] != row["sha256"]
    ]
    shape = (-1, spec.grid_height, spec.grid_width)
    positions = CAUSAL_1.positions(*shape[1:])
    grids = np.stack(others).reshape(shape)
    entries = key_vectors(CAUSAL_1.keys(grids).reshape(-1, 4), codes).astype(np.float64)
    values = grids.reshape(len(grids), -1)[:, positions].reshape(-1)
    own = np.array(row["tokens"], np.uint16).reshape(shape)
    keys = key_vectors(CAUSAL_1.keys(own)[0], codes)
    found = np.array(row["neighbors"], np.uint16).reshape(spec.positions, K)
    assert (np.delete(found, positions, axis=0) == MISSING).all()
    for position, key in list(zip(positions, keys, strict=True))[:: len(positions) // 12]:
        distances = ((entries - key) ** 2).sum(1)
        last = np.sort(distances)[K - 1]
        tokens = Counter(found[position].tolist())
        assert not Counter(values[distances < last - 1e-5].tolist()) - tokens
        assert not tokens - Counter(values[distances <= last + 1e-5].tolist())


def test_held_out_pictures_retrieve_from_the_database(database: Path, tmp_path: Path) -> None:
    report = make_trainset(TrainsetSettings(database=database, k=K, out=tmp_path / "set"))
    rows = rows_of(report).to_pylist()
    held_out = {i["image_id"]: i for i in images_of(database) if i["split"] == "heldout"}
    captioned = {key for key, image in held_out.items() if image["caption"]}
    assert {row["image_id"] for row in rows} == captioned
    assert report.captionless == len(held_out) - len(captioned)
    assert (report.manifest.pictures, report.images, report.added) == (
        "heldout",
        len(rows),
        len(rows),
    )
    for row in rows:
        image = held_out[row["image_id"]]
        assert (row["caption"], row["tokens"]) == (image["caption"], image["tokens"])
        check_row(row, database)


def test_pictures_of_the_database_retrieve_neither_themselves_nor_their_copies(
    database: Path, tmp_path: Path
) -> None:
    wanted = TrainsetSettings(database=database, k=K, pictures="database", out=tmp_path / "set")
    rows = rows_of(make_trainset(wanted)).to_pylist()
    hashes = Counter(i["sha256"] for i in images_of(database) if i["split"] == "database")
    assert max(hashes[row["sha256"]] for row in rows) == 2
    for row in rows:
        check_row(row, database)


def test_without_held_out_pictures_those_of_the_database_are_taken(
    ray_session: None, tmp_path: Path
) -> None:
    database = make_captioned(tmp_path / "db", held_out=False)
    report = make_trainset(TrainsetSettings(database=database, k=K, limit=9))
    assert report.folder == str(database / "trainset")
    assert (report.manifest.pictures, report.images, report.captionless) == ("database", 9, 2)
    for row in rows_of(report).to_pylist():
        check_row(row, database)


@pytest.mark.slow
def test_pictures_of_another_source_are_encoded_and_their_copies_excluded(
    copied: Path, tmp_path: Path
) -> None:
    index(copied, IndexSettings(kind="flat"))
    here = [i for i in images_of(copied) if i["split"] == "database"]
    known = next(i for i in here if i["key"].endswith(("1.jpg", "2.jpg", "4.jpg", "5.jpg")))
    seed = int(known["key"].removesuffix(".jpg")[-2:])
    folder = tmp_path / "more"
    write_picture(folder / "new.jpg", 50)
    write_picture(folder / "known.jpg", seed)
    write_picture(folder / "silent.jpg", 51)
    (folder / "new.txt").write_text("a new picture")
    (folder / "known.txt").write_text("one that the database has")
    source = SourceSettings(name="folder", input=(str(folder),), shard_size=2)
    wanted = TrainsetSettings(database=copied, k=K, source=source, out=tmp_path / "set")
    rows = {row["caption"]: row for row in rows_of(make_trainset(wanted)).to_pylist()}
    assert rows.keys() == {"a new picture", "one that the database has"}
    again = rows["one that the database has"]
    assert (again["sha256"], again["tokens"]) == (known["sha256"], known["tokens"])
    for row in rows.values():
        check_row(row, copied)
    assert make_trainset(wanted).added == 0


def test_an_interrupted_set_goes_on_and_ends_the_same(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainset, "IMAGES_PER_TASK", 2)
    wanted = TrainsetSettings(database=database, k=K, pictures="database", out=tmp_path / "whole")
    whole = make_trainset(wanted)
    wanted = TrainsetSettings(database=database, k=K, pictures="database", out=tmp_path / "broken")
    append, appended = RowTable.append, list[Any]()

    def dies(table: RowTable, fragments: list[str]) -> None:
        if appended:
            raise KeyboardInterrupt
        append(table, fragments)
        appended.append(fragments)

    with monkeypatch.context() as patch:
        patch.setattr(RowTable, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            make_trainset(wanted)
    with pytest.raises(BadInputError, match="no complete training set at"):
        TrainingSet.open(tmp_path / "broken")
    done: list[tuple[int, int]] = []
    again = make_trainset(wanted, lambda _step, *state: done.append(state))
    assert (again.images, again.added) == (whole.images, whole.images - 2)
    assert done[-1][0] == done[-1][1] == -(-(whole.images - 2) // 2)
    assert rows_of(again).equals(rows_of(whole))
    assert make_trainset(wanted).added == 0


def test_a_removed_picture_is_not_taken_and_is_not_kept(ray_session: None, tmp_path: Path) -> None:
    """Neither into a new set, also before any compaction, nor in one that is added to."""
    database = make_captioned(tmp_path / "db")
    wanted = TrainsetSettings(database=database, k=K, pictures="database", out=tmp_path / "old")
    before = make_trainset(wanted)
    gone = rows_of(before)["image_id"][0].as_py()
    removal = plan_removal(str(database), RemovalRequest(image_ids=(gone,)))
    removed = set(carry_out(str(database), removal, "why", "command").image_ids)
    with pytest.raises(
        IncompatibleError, match=rf"holds {len(removed)} pictures that were removed"
    ):
        make_trainset(wanted)
    after = make_trainset(replace(wanted, out=tmp_path / "new"))
    kept = set(rows_of(before)["image_id"].to_pylist()) - removed
    assert set(rows_of(after)["image_id"].to_pylist()) == kept
    assert after.captionless == before.captionless


def test_a_larger_limit_only_adds_pictures(database: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    few = make_trainset(
        TrainsetSettings(database=database, k=K, pictures="database", out=out, limit=2)
    )
    before = rows_of(few)
    assert few.images == 2
    more = make_trainset(
        TrainsetSettings(database=database, k=K, pictures="database", out=out, limit=4)
    )
    assert (more.images, more.added) == (4, 2)
    after = rows_of(more).to_pylist()
    assert all(row in after for row in before.to_pylist())


def test_a_set_of_other_settings_is_not_mixed(database: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    make_trainset(TrainsetSettings(database=database, k=K, limit=1, out=out))
    with pytest.raises(IncompatibleError, match=r"was made with --k 3, not 4; name another folder"):
        make_trainset(TrainsetSettings(database=database, k=4, limit=1, out=out))
    with pytest.raises(IncompatibleError, match="made with pictures heldout, not database"):
        make_trainset(
            TrainsetSettings(database=database, k=K, limit=1, out=out, pictures="database")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "--k is 0; give 1 or more"),
        ({"pictures": "x"}, "unknown --from 'x'; choose one of heldout, database"),
        ({"pictures": "database", "source": SourceSettings(name="sample")}, "give one"),
        ({"index": "gone"}, "no complete index at"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    database: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        make_trainset(TrainsetSettings(database=database, out=tmp_path / "set", **changes))
    assert not (tmp_path / "set").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BadInputError, match=r"is no training set and not empty \(it holds letter"):
        make_trainset(TrainsetSettings(database=database, out=tmp_path / "mine"))


def test_the_folder_and_its_export_read_the_same(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EXPORT_ROWS", 2)
    report = make_trainset(
        TrainsetSettings(database=database, k=K, pictures="database", out=tmp_path / "set")
    )
    export_trainset(report.folder, tmp_path / "set.arrow")
    folder, file = TrainingSet.open(report.folder), TrainingSet.open(tmp_path / "set.arrow")
    assert folder.manifest == file.manifest == report.manifest
    assert np.array_equal(folder.codebook, file.codebook)
    assert len(folder) == len(file) == report.images
    rows = rows_of(report)
    order = [3, 0, 2]
    for opened in (folder, file):
        examples = opened.rows(order)
        assert examples.captions == [rows["caption"][n].as_py() for n in order]
        assert np.array_equal(examples.tokens, list_values(rows["tokens"])[order])
        neighbors = list_values(rows["neighbors"])[order].reshape(3, -1, K)
        assert np.array_equal(examples.neighbors, neighbors)
    with pytest.raises(BadInputError, match="no training set at"):
        TrainingSet.open(tmp_path / "gone")
    (tmp_path / "text.arrow").write_text("hello")
    with pytest.raises(BadInputError, match="no training set"):
        TrainingSet.open(tmp_path / "text.arrow")


def test_a_failing_task_is_one_line_and_keeps_what_came_before(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainset, "IMAGES_PER_TASK", 4)
    chosen = trainset._tasks

    def one_is_gone(*given: Any) -> Any:
        tasks, captionless = chosen(*given)
        return [tasks[0], [12345], *tasks[2:]], captionless

    wanted = TrainsetSettings(database=database, k=K, pictures="database", out=tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(trainset, "_tasks", one_is_gone)
        with pytest.raises(
            ArragError, match=r"retrieving failed: .*12345.*; what came before is kept"
        ):
            make_trainset(wanted)
    assert make_trainset(wanted).added == make_trainset(wanted).images - 4


def test_the_command_says_what_it_made(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "set", tmp_path / "set.arrow"
    words = ("trainset", "--db", database, "--k", "2", "--limit", "4", "--out", out)
    code, text, _ = run(capsys, *words)
    assert code == 0
    assert text == (
        f"training set {out}: 4 pictures (4 new), 2 retrieved tokens at each of 30 positions\n"
        "pictures: heldout; index: flat\n"
    )
    code, text, _ = run(capsys, *words, "--export", file, "--json")
    fields = json.loads(text)
    assert (code, fields["images"], fields["added"], fields["export"]) == (0, 4, 0, str(file))
    assert len(TrainingSet.open(file)) == 4
    code, text, err = run(capsys, *words[:-2], "--input", tmp_path)
    assert (code, text) == (1, "")
    assert err == "error: --input says more about a --source; give --source too\n"
