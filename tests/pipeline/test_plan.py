"""Forecasts by arithmetic, and machines judged by facts that a test makes up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arrag_runtime.format.errors import BadInputError
from pipeline.doctor import Finding, Machine, diagnose, examine, to_text
from pipeline.plan import Forecast, ForecastSettings, forecast, size, suggest_index, work_out
from pipeline.plan import to_text as plan_text
from schemas.records import Count
from schemas.settings.source import SourceSettings
from tests.worlds.source_cases import datacomp_rows, parquet_of, tsv_of

GB = 10**9


def plan_of(name: str, inputs: int, **changes: Any) -> Forecast:
    """The forecast for so many inputs of this source."""
    count = Count(inputs, exact=True, links=name in ("cc12m", "datacomp"))
    return work_out(ForecastSettings(SourceSettings(name), **changes), count)


def test_twelve_million_pictures() -> None:
    """The sizes that docs state for 12 million images, and 9 bytes of memory a key."""
    made = plan_of("folder", 12_000_000, images_per_second=100.0)
    assert made.patches == 12_000_000 * 506
    assert made.tables["patches"] == 13 * made.patches
    assert round(made.tables["patches"] / GB) == 79
    assert round(made.tables["images"] / GB) == 13
    assert made.index_memory == {
        "codebook": 9 * made.patches,
        "ivfpq": 18 * made.patches,
        "flat": 128 * made.patches,
    }
    assert made.gpu_hours == pytest.approx(12_000_000 / 100 / 3600)
    assert made.download_hours is None


def test_downloads_and_what_is_held_out() -> None:
    """A tenth of the addresses is dead; held-out pictures have grids and no patches."""
    made = plan_of("datacomp", 1000, rate=10.0, hold_out=0.1)
    assert (made.images, made.heldout, made.patches) == (900, 90, 810 * 506)
    assert made.download_hours == pytest.approx(1000 / 10 / 3600)
    assert made.gpu_hours is None
    assert "give --images-per-second" in plan_text(made)
    other = plan_of("cc12m", 1000, success=0.5, neighborhood="surround-1", border="zero")
    assert (other.images, other.patches) == (500, 500 * 576)
    assert other.tables["patches"] == 21 * other.patches
    assert other.index_memory["flat"] == 8 * 8 * 4 * other.patches


def test_the_suggested_index_is_fast_enough() -> None:
    """Scanned codes at 11 ns, lists 2.1 times imbalanced; threads for the time that was asked."""
    small = suggest_index(50_000, 5.0)
    assert (small["kind"], small["lists"]) == ("codebook", 50_000 // 39)
    assert suggest_index(50_000, 5.0, space="latent")["kind"] == "flat"
    billions = suggest_index(6_000_000_000, 5.0)
    scanned = 6e9 / billions["lists"] * billions["nprobe"] * 2.1
    assert billions["kind"] == "codebook"
    assert billions["milliseconds"] == pytest.approx(0.3 + scanned * 11e-6)
    assert billions["milliseconds"] / billions["threads"] <= 5.0
    assert (billions["threads"] - 1) * 5.0 < billions["milliseconds"]
    latent = suggest_index(10**9, 5.0, space="latent")
    assert (latent["kind"], latent["lists"]) == ("ivfpq", round(4 * 10**4.5))


def test_a_plan_counts_footers_and_says_what_it_estimates(tmp_path: Path) -> None:
    """Exact from footers; with a condition from a sample of rows; a list from its size."""
    for n in range(3):
        parquet_of(tmp_path / "m" / f"{n}.parquet", datacomp_rows(100 + n))
    rows = SourceSettings("datacomp", (str(tmp_path / "m"),))
    made = forecast(ForecastSettings(rows, tmp_path / "no-db"))
    assert (made.inputs, made.exact, made.in_database) == (303, True, 0)
    assert plan_text(made).startswith("datacomp: 303 inputs\n")
    assert made.download_hours == pytest.approx(303 / 300 / 3600)
    some = replace(rows, where="clip_l14_similarity_score >= 0.75")
    made = forecast(ForecastSettings(some))
    assert not made.exact
    assert made.inputs == 303 - 150
    assert "153 of 303 rows looked at pass --where" in plan_text(made)
    assert forecast(ForecastSettings(replace(rows, limit=7))).inputs == 7
    path = tsv_of(tmp_path / "l.tsv", 50_000)
    made = forecast(ForecastSettings(SourceSettings("cc12m", (str(path),))))
    assert not made.exact
    assert 45_000 < made.inputs < 55_000
    assert plan_text(made).startswith("cc12m: about ")
    json.dumps(made.to_json())


def test_a_plan_fetches_nothing(tmp_path: Path) -> None:
    """The published list's length is known; any other list at an address is not fetched."""
    made = forecast(ForecastSettings(SourceSettings("cc12m", cache=str(tmp_path))))
    assert (made.inputs, made.exact) == (12_423_374, False)
    for settings in (
        SourceSettings("cc12m", ("http://127.0.0.1:9/l.tsv",)),
        SourceSettings("cc12m", where="caption like '%a%'"),
    ):
        with pytest.raises(BadInputError, match=r"fetches no list.*--input"):
            forecast(ForecastSettings(settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (2_340_000, "2.3 MB"), (5 * 10**12, "5.0 TB")],
)
def test_sizes_for_people(count: int, shown: str) -> None:
    assert size(count) == shown


FIT = Machine(
    python="3.11.9",
    packages={"faiss-cpu": "1.12", "numpy": "1.26.4", "pyarrow": "25.0.1", "torch": "2.13"}
    | {"ray": "2.60", "autofaiss": "2.18"},
    cuda_build=None,
    gpus=(),
    nvidia=False,
    hub_token=True,
    free_disk=10**12,
    memory=64 * GB,
    open_files=65_536,
    shared_memory=16 * GB,
    ray_auth="token",
    ray_token=True,
)


def verdicts(machine: Machine, plan: Forecast | None = None, **options: Any) -> dict[str, str]:
    """The verdict on each thing that is not as it should be."""
    findings = diagnose(machine, plan, **options)
    assert all(f.step for f in findings if f.verdict != "ok")
    return {f.name: f.verdict for f in findings if f.verdict != "ok"}


def test_a_machine_that_is_fit_has_nothing_to_mend() -> None:
    """Except that it has no GPU, which is a warning; with one, faiss should be the GPU's."""
    assert verdicts(FIT) == {"GPU": "warn"}
    gpu = replace(FIT, gpus=("H100",), cuda_build="12.8", nvidia=True)
    assert verdicts(gpu, gpus=1) == {"faiss": "warn"}
    swapped = {"faiss-gpu": "1.12"} | {k: v for k, v in FIT.packages.items() if k != "faiss-cpu"}
    assert verdicts(replace(gpu, packages=swapped), gpus=1) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"packages": FIT.packages | {"faiss-gpu": "1.12"}}, {"faiss": "FAIL"}),
        ({"packages": {"ray": "2.60"}}, {"faiss": "FAIL"}),
        ({"packages": FIT.packages | {"numpy": "2.3.1"}}, {"packages": "FAIL"}),
        ({"packages": FIT.packages | {"pyarrow": "26.0"}}, {"packages": "FAIL"}),
        ({"hub_token": False}, {"hub token": "warn"}),
        ({"free_disk": 10**9}, {"disk": "warn"}),
        ({"memory": 10**9}, {"memory": "warn"}),
        ({"open_files": 1024}, {"file limit": "warn"}),
        ({"shared_memory": 64 << 20}, {"/dev/shm": "warn"}),
        ({"shared_memory": None}, {"/dev/shm": "warn"}),
        ({"ray_token": False}, {"Ray": "FAIL"}),
        ({"nvidia": True}, {}),
    ],
)
def test_what_is_wrong_is_named_with_the_next_step(
    changes: dict[str, Any], expected: dict[str, str]
) -> None:
    assert verdicts(replace(FIT, **changes)) == {"GPU": "warn"} | expected


def test_a_machine_is_compared_with_the_plan() -> None:
    """Disk that does not suffice fails, memory warns; a gated data set needs a token."""
    made = plan_of("journeydb", 12_000_000)
    assert verdicts(FIT, made) == {"GPU": "warn"}
    small = replace(FIT, free_disk=100 * GB, memory=40 * GB, hub_token=False)
    expected = {"GPU": "warn", "disk": "FAIL", "memory": "warn", "hub token": "FAIL"}
    assert verdicts(small, made) == expected
    without = replace(FIT, packages={k: v for k, v in FIT.packages.items() if k != "autofaiss"})
    assert verdicts(without, made) == {"GPU": "warn"}
    latent = replace(made, index={**made.index, "kind": "ivfpq"})
    assert verdicts(without, latent) == {"GPU": "warn", "packages": "warn"}
    assert verdicts(FIT, latent) == {"GPU": "warn"}
    assert verdicts(FIT, gpus=2)["GPU"] == "FAIL"
    assert verdicts(FIT, gpus=2, address="10.0.0.1:6379")["GPU"] == "warn"
    cpu_torch = {f.name: f for f in diagnose(replace(FIT, nvidia=True), gpus=1)}["GPU"]
    assert (cpu_torch.verdict, cpu_torch.step) == ("FAIL", "install a CUDA build of torch")
    assert verdicts(replace(FIT, ray_auth=""), address="10.0.0.1:6379")["Ray"] == "warn"


def test_this_machine_can_be_examined(tmp_path: Path) -> None:
    """Also for a database that is not there yet; text has a step below what is not ok."""
    machine = examine(tmp_path / "not" / "yet")
    assert machine.free_disk
    assert examine("s3://bucket/db").free_disk is None
    assert machine.memory > 0
    assert machine.packages["ray"]
    lines = to_text([Finding("a", "ok", "fine"), Finding("b", "FAIL", "bad", "do this")])
    assert lines == "ok   a: fine\nFAIL b: bad\n     → do this"
