"""Building from the sources of tables and grids: end to end on real Ray and Lance."""

import json
from pathlib import Path

import lance
import numpy as np
import pytest

from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.list_columns import list_values
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from pipeline.build import build
from pipeline.info import info, to_text
from pipeline.verify import verify
from schemas.records import GridShape
from schemas.settings.build import BuildSettings
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings
from tests.pipeline.conftest import settings
from tests.worlds.command_line import run
from tests.worlds.database_rows import all_rows
from tests.worlds.source_cases import grid_of, parquet_of

SHAPE = GridShape(24, 24, 4096)


def grids_of(folder: Path, count: int) -> Path:
    """Token files of the bundled tokenizer's shape, and two that do not fit."""
    folder.mkdir()
    for n in range(count):
        np.save(folder / f"{n}.npy", grid_of(n, SHAPE).reshape(1, 1, -1))
    np.save(folder / "short.npy", np.zeros((1, 1, 100), np.int64))
    np.save(folder / "wide.npy", np.full((24, 24), 4096))
    return folder


def token_settings(database: Path, folder: Path, **changes: object) -> BuildSettings:
    source = SourceSettings(name="tokens", input=(str(folder),), shard_size=3)
    fields: dict[str, object] = {"tokenizer": "sample", "resources": RayResources(workers=1)}
    return BuildSettings(database=database, source=source, **fields | changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_database_from_token_grids(
    ray_session: None, pictures: Path, copied: Path, tmp_path: Path
) -> None:
    """Grids join a database of pictures: same tables, counts a source, and it verifies."""
    folder = grids_of(tmp_path / "codes", 5)
    report = build(token_settings(copied, folder))
    assert (report.inputs, report.images, report.failed) == (7, 5, {})
    assert report.rejects == {"grid-size": 1, "token-outside": 1}
    rows = [r for r in all_rows(copied)["images"].to_pylist() if r["source"] == "tokens"]
    assert {r["key"] for r in rows} == {f"{n}.npy" for n in range(5)}
    for row in rows:
        expected = grid_of(int(row["key"][0]), SHAPE).reshape(-1).tolist()
        assert row["tokens"] == expected
        assert (row["width"], row["height"]) == (0, 0)
    assert [check for check in verify(copied, full=True) if not check.ok] == []
    fields = info(copied)
    assert fields["by_source"]["tokens"]["inputs"] == 7
    assert fields["by_source"]["folder"]["images"] == 10
    for name in ("inputs", "images", "heldout", "patches"):
        assert sum(counts[name] for counts in fields["by_source"].values()) == fields[name]
    assert "from tokens: 7 inputs, 5 images, 2 rejects" in to_text(fields)
    assert build(token_settings(copied, folder)).shards_done == 0


def test_grids_need_their_tokenizer_and_no_latents(
    ray_session: None, copied: Path, tmp_path: Path
) -> None:
    folder = grids_of(tmp_path / "codes", 1)
    with pytest.raises(BadInputError, match=r"needs --tokenizer: the one that made the grids"):
        build(token_settings(copied, folder, tokenizer=None))
    with pytest.raises(IncompatibleError, match=r"no latents.*--key-space codebook"):
        build(token_settings(tmp_path / "new", folder, key_space="latent"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_rows_of_a_table_by_condition_then_the_rest(
    ray_session: None, pictures: Path, tmp_path: Path
) -> None:
    """A build with a condition, the same again, then one without: every row once, as planned."""
    data = [(pictures / f"{n:02}.jpg").read_bytes() for n in (1, 2, 4, 5, 7, 8)]
    rows = [{"image": d, "id": f"r{n}", "score": n / 10} for n, d in enumerate(data)]
    path = parquet_of(tmp_path / "t.parquet", [*rows, {"image": b"", "id": "r6", "score": 0.6}])
    database = tmp_path / "db"

    def settings_of(**changes: object) -> BuildSettings:
        source = SourceSettings(name="parquet", input=(str(path),), shard_size=4, **changes)  # type: ignore[arg-type]
        return settings(database, pictures, source=source)

    first = build(settings_of(where="score > 0.25", shuffle_seed=1))
    assert (first.inputs, first.images, first.rejects) == (4, 3, {"empty": 1})
    again = build(settings_of(where="score>0.25", shuffle_seed=1))
    assert again.shards_done == 0
    rest = build(settings_of())
    assert (rest.inputs, rest.images) == (3, 3)
    images = all_rows(database)["images"]
    assert sorted(images["key"].to_pylist()) == [f"r{n}" for n in range(6)]
    kept = {r["key"]: json.loads(r["metadata"]) for r in images.to_pylist()}
    assert kept["r5"] == {"score": 0.5}
    assert [check for check in verify(database, full=True) if not check.ok] == []
    runs = DatabaseManifest.read(Layout(database)).runs
    assert [(r["where"], r["shuffle_seed"]) for r in runs] == [("score > 0.25", 1), (None, None)]
    table = lance.dataset(Layout(database).images).to_table(columns=["tokens"])
    assert list_values(table["tokens"]).shape == (6, 576)


def test_plan_and_doctor_as_commands(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and JSON; a plan knows what the database has; a machine that is not ready exits 1."""
    folder = grids_of(tmp_path / "codes", 3)
    words = ("plan", "--source", "tokens", "--input", folder, "--db", copied)
    code, out, err = run(capsys, *words, "--images-per-second", "10")
    assert code == 0, err
    assert out.startswith("tokens: 5 inputs\n")
    code, out, _ = run(
        capsys, "plan", "--source", "folder", "--input", folder.parent / "p", "--json"
    )
    assert code == 1
    code, out, _ = run(capsys, *words, "--json")
    fields = json.loads(out)
    assert (fields["inputs"], fields["exact"], fields["settings"]["hold_out"]) == (5, True, 0.3)
    code, out, _ = run(capsys, "doctor", "--db", tmp_path, "--json")
    found = json.loads(out)
    names = {finding["name"] for finding in found["findings"]}
    assert names >= {"faiss", "GPU", "hub token", "disk", "memory", "file limit", "/dev/shm", "Ray"}
    assert found["ok"] == (code == 0)
    code, out, err = run(capsys, "doctor", "--db", tmp_path, "--gpus", "99")
    assert code == 1
    assert "FAIL GPU: --gpus 99" in out
    assert err.startswith("error: this machine is not ready: GPU")
