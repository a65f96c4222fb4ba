"""The commands as users type them: text, JSON, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds.command_line import run

INFO = {"inputs", "images", "heldout", "patches", "rejects", "tokenizer", "grid"}
INFO |= {"neighborhood", "border", "key_space", "indexes"}
INDEX = {"kind", "keys", "nprobe", "recall_at_10", "code_bytes_per_key"}
INDEX |= {"resident_bytes_per_key", "ms_per_query"}
BUILD = {"seconds", "images_per_second", "shards_done", "shards_skipped", "shards_failed"}


def test_build_then_look(
    ray_session: None, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    db = tmp_path / "db"
    words = ("build", "--source", "folder", "--input", pictures, "--db", db, "--limit", "4")
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "4 inputs = 4 images + 0 rejects; 0 held out, 2,024 patches" in out
    # 39 keys a list, of 2,024.
    assert "index codebook: IVF51,PQ4x12 (the codebook), nprobe " in out
    assert "2,024 keys in 2,024 entries, 6.0 bytes of code a key, 8.0 resident" in out
    assert " reaches recall@10 of 0.95: recall @1 " in out
    code, out, _ = run(capsys, *words)
    assert (code, out) == (0, "nothing to do: all 1 shards are in the database\n")
    code, out, _ = run(capsys, *words, "--json")
    fields = json.loads(out)
    assert code == 0
    assert fields.keys() >= INFO | BUILD
    assert fields["indexes"]["codebook"].keys() >= INDEX
    assert (fields["images"], fields["grid"], fields["shards_skipped"]) == (4, [24, 24], 1)
    code, out, _ = run(
        capsys,
        "query",
        "--db",
        db,
        "--image",
        pictures / "01.jpg",
        "--row",
        "2",
        "--col",
        "2",
        "-k",
        "1",
    )
    heading, line = out.splitlines()
    assert heading.split() == [
        "query",
        "distance",
        "token",
        "image",
        "row",
        "col",
        "caption",
        "url",
    ]
    assert line.split()[:2] == ["2,2", "0.0000"]
    code, out, _ = run(capsys, "verify", "--db", db, "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    code, out, _ = run(capsys, "info", "--db", db)
    assert "inputs 4 = 4 images + 0 rejects (0 of the images held out)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "--db", "nowhere"], "no database at nowhere (no manifest.json); build one with"),
        (["build", "--source", "flickr"], "unknown source 'flickr'; choose one of sample, folder"),
        (["build", "--source", "folder"], "--source folder needs --input PATH"),
        (["build", "--source", "folder", "-i", "gone"], "--input '"),
        (
            ["build", "--source", "sample", "--tokenizer", "x"],
            "unknown tokenizer 'x'; choose one of",
        ),
        (
            ["build", "--source", "sample", "--neighborhood", "x"],
            "unknown neighbourhood 'x'; choose",
        ),
        (
            [
                "build",
                "--source",
                "sample",
                "--tokenizer",
                "vq16",
                "--tokenizer-weights",
                "gone.pt",
            ],
            "no tokenizer weights at 'gone.pt'; give",
        ),
        (
            ["build", "--source", "sample", "--retry-rejects", "dns,teapot"],
            "--retry-rejects 'teapot' is no reason of a reject; choose from bad-line, bad-url",
        ),
        (
            ["build", "--source", "sample", "--retry-rejects", ","],
            "--retry-rejects ',' names no reason; write e.g. 'dns,timeout'",
        ),
        (
            ["build", "--source", "sample", "--retry-rejects", "dns"],
            "no database at",
        ),
        (
            ["build", "--source", "sample", "--user-agent-contact", "me (at home)"],
            "--user-agent-contact 'me (at home)' does not fit a header; write a URL or",
        ),
        (
            ["build", "--source", "sample", "--keep-images", "s3://bucket/kept"],
            "--keep-images s3://bucket/kept is no folder; name one",
        ),
        (["query", "--tokens", "1,b"], "--tokens '1,b' is no list of numbers; write them like"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_1(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "build")[0] == 2
    assert run(capsys, "build", "--source", "sample", "--hold-out", "2")[0] == 2
    assert run(capsys, "nonsense")[0] == 2
    for option in ("--key-space", "--border", "--precision"):
        code, _, err = run(capsys, "build", "--source", "sample", option, "x")
        assert code == 2
        assert option in err
        assert "'x'" in err


def test_nothing_is_left_of_a_build_that_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "build", "--source", "sample", "--neighborhood", "x", "--db", "db")[0] == 1
    assert run(capsys, "build", "--source", "folder", "-i", "gone", "--db", "db")[0] == 1
    assert not list(tmp_path.rglob("*.lance"))
    assert not (tmp_path / "db" / "manifest.json").exists()


def test_verify_exits_1_and_names_what_is_wrong(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "codebook.npy").unlink()
    code, out, err = run(capsys, "verify", "--db", copied)
    assert code == 1
    assert "FAILED codebook agrees with the manifest" in out
    assert err == f"error: database {copied} is not sound: codebook agrees with the manifest\n"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, cli; print([m for m in ('torch', 'ray', 'lance', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
