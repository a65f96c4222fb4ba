"""`arrag generate` as a user types it: on a real database, with a narrow model of the real classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrag_runtime.faid.adapter import Adapter, model_codebook, write_adapter
from arrag_runtime.faid.attach import attach
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import Layout
from tests.worlds import command_line
from tests.worlds.captioned_world import CODEBOOK, SQUARE, make_captioned
from tests.worlds.janus_world import narrow_janus as wide_janus
from tests.worlds.janus_world import stirred
from tests.worlds.narrow_janus import narrow_janus, save_checkpoint, text_tokenizer

PROMPT = "a photo of a hat"


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one `arrag` command."""
    return command_line.run(capsys, *words, program="arrag")


def generator(codes: Any) -> tuple[Any, Any]:
    """A narrow generator for these codes, 7 x 7 tokens a picture, and its text tokenizer."""
    words = text_tokenizer()
    model = narrow_janus(words, codes=len(codes), dimension=codes.shape[1])
    with torch.no_grad():
        model.model.vqmodel.quantize.embedding.weight.copy_(torch.from_numpy(codes))
    return model, words


def checkpoint(folder: Path, codes: Any) -> Path:
    """Its folder."""
    return save_checkpoint(folder, *generator(codes))


def adapter(path: Path, model: Any) -> Path:
    """The file of an adapter with random blenders for a model."""
    faid = stirred(attach(model))
    faid.detach()
    tensors = {f"faid.{name}": tensor for name, tensor in faid.state_dict().items()}
    write_adapter(path, Adapter(faid.spec, tensors, model_codebook(model)))
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with made-up grids, indexed. Read only."""
    return make_captioned(tmp_path_factory.mktemp("captioned") / "db", spec=SQUARE)


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that fits the database."""
    return checkpoint(tmp_path_factory.mktemp("model") / "fitting", CODEBOOK)


def test_generate_and_trace(
    database: Path, fitting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture, its tokens as JSON, and the origin of what retrieval brought, from the database."""
    out, trace, sheet = (
        tmp_path / "a" / "o.png",
        tmp_path / "b" / "t.json",
        tmp_path / "c" / "s.png",
    )
    words = ("generate", "--db", database, "--model", fitting, "-p", PROMPT, "--lambda", "0.5")
    wanted = ("--out", out, "--trace", trace, "--trace-sheet", sheet, "--json")
    code, text, err = run(capsys, *words, "-n", "1", *wanted)
    assert (code, err) == (0, "")
    assert Image.open(out).size == (112, 112)
    assert Image.open(sheet).format == "PNG"
    told = json.loads(text)
    grid = np.array(told["methods"][0]["images"][0]["tokens"])
    assert (told["mode"], told["methods"][0]["method"], grid.shape) == ("daid", "daid", (7, 7))
    traced = json.loads(trace.read_text())
    assert traced["databases"] == [str(database)]
    assert (traced["lambda"], traced["tau"], traced["merge"], traced["k"]) == (
        0.5,
        0.6,
        "nearest",
        2048,
    )
    tokens = traced["images"][0]["tokens"]
    assert [token["token"] for token in tokens] == grid.reshape(-1).tolist()
    entries = [(token, entry) for token in tokens for entry in token["entries"]]
    assert len(entries) > 10
    table = ImageTable(Layout(database).images)
    ids = sorted({entry["image_id"] for _, entry in entries})
    rows, grids = table.rows(ids), table.grids(ids, 7)
    assert {rows[image].split for image in ids} == {"database"}
    for token, entry in entries:
        row = rows[entry["image_id"]]
        assert (entry["caption"], entry["url"], entry["key"]) == (row.caption, row.url, row.key)
        assert grids[entry["image_id"]][entry["row"], entry["col"]] == token["token"]
        assert 0 < entry["weight"] <= 1
    assert traced["images"][0]["longest_copy"]["length"] >= 1


def test_several_databases_are_searched_as_one(
    database: Path, fitting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each result knows which one it is from; a source is looked up there."""
    other = make_captioned(tmp_path / "other", spec=SQUARE, held_out=False)
    trace = tmp_path / "t.json"
    words = ("generate", "--db", database, "--db", other, "--model", fitting, "-p", PROMPT)
    code, _, err = run(
        capsys, *words, "-n", "1", "--lambda", "0.5", "-o", tmp_path / "o.png", "--trace", trace
    )
    assert (code, err) == (0, "")
    traced = json.loads(trace.read_text())
    assert traced["databases"] == [str(database), str(other)]
    entries = [entry for token in traced["images"][0]["tokens"] for entry in token["entries"]]
    assert {entry["database"] for entry in entries} == {0, 1}
    assert all(entry["key"] for entry in entries)
    # Held-out pictures are searched in the second database only.
    held_out = {entry["key"] for entry in entries if entry["database"] == 1}
    assert "0.jpg" in held_out or "3.jpg" in held_out or "6.jpg" in held_out


def test_compare_puts_methods_side_by_side(
    database: Path, fitting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain and DAiD with λ = 0 draw the same picture twice; a line of text for each."""
    out = tmp_path / "o.png"
    words = ("generate", "--db", database, "--model", fitting, "-p", PROMPT, "-n", "1")
    code, text, _ = run(capsys, *words, "--mode", "compare", "--lambda", "0", "-o", out)
    assert code == 0
    first, second, last = text.splitlines()
    assert first.startswith("plain: 1 pictures, ")
    assert second.startswith("DAiD: 1 pictures, ")
    assert last == f"wrote {out}"
    sheet = np.array(Image.open(out))
    left, right = sheet[54:166, 24:136], sheet[54:166, 148:260]
    np.testing.assert_array_equal(left, right)
    assert left.std() > 1


def test_all_three_methods_stand_side_by_side(
    database: Path, fitting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAiD draws another picture than plain decoding, alone the same as beside the others."""
    trained = adapter(tmp_path / "a.safetensors", generator(CODEBOOK)[0])
    given = ("generate", "--db", database, "--model", fitting, "-p", PROMPT, "-n", "1", "--json")
    words = (*given, "--adapter", trained, "-o", tmp_path / "o.png")
    code, text, err = run(capsys, *words, "--mode", "compare")
    assert (code, err) == (0, "")
    drawn = {one["method"]: one["images"][0]["tokens"] for one in json.loads(text)["methods"]}
    assert list(drawn) == ["plain", "daid", "faid"]
    assert drawn["faid"] != drawn["plain"]
    trace = tmp_path / "t.json"
    code, text, err = run(capsys, *words, "--mode", "faid", "--trace", trace)
    assert (code, err) == (0, "")
    assert json.loads(text)["methods"][0]["images"][0]["tokens"] == drawn["faid"]
    traced = json.loads(trace.read_text())
    weights = [e["weight"] for t in traced["images"][0]["tokens"] for e in t["entries"]]
    assert (traced["method"], set(weights)) == ("faid", {0.1})


def test_an_adapter_for_another_width_is_refused(
    database: Path, fitting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is drawn; the adapter is named."""
    wider = adapter(tmp_path / "wider.safetensors", wide_janus(width=48))
    out = tmp_path / "o.png"
    words = ("generate", "--db", database, "--model", fitting, "-p", PROMPT, "--mode", "faid")
    code, _, err = run(capsys, *words, "--adapter", wider, "-o", out)
    assert code == 1
    assert err.startswith("error: ")
    assert str(wider) in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lambda", "1.5"), "λ is 1.5; it is a share, so use 0..1"),
        (("--tau", "0"), "τ is 0.0"),
        (("--mode", "faid"), "--mode faid needs an adapter"),
        (("--adapter", "x.safetensors"), "--mode daid uses no adapter"),
        (("--mode", "plain", "--trace", "t.json"), "--mode plain retrieves nothing to trace"),
        (("--index", "none"), "no complete index at"),
        (("--model", "/nowhere"), "no model at '/nowhere'"),
        (("--db", "/nowhere"), "no database at /nowhere"),
        (("--mode", "compare", "--adapter", "/nowhere.safetensors"), "/nowhere.safetensors"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    message: str,
    database: Path,
    fitting: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 1, one line, and nothing is written."""
    given = (
        "generate",
        "--db",
        database,
        "--model",
        fitting,
        "-p",
        PROMPT,
        "-o",
        tmp_path / "o.png",
    )
    code, text, err = run(capsys, *given, *words)
    assert (code, text) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("words", "choices"),
    [(("--merge", "best"), "nearest sum"), (("--mode", "magic"), "plain daid faid compare")],
)
def test_a_wrong_choice_is_wrong_usage(
    words: tuple[str, ...], choices: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and what there is to choose from."""
    code, text, err = run(capsys, "generate", "-p", PROMPT, *words)
    assert (code, text) == (2, "")
    assert words[1] in err
    assert all(choice in err for choice in choices.split())


def test_a_database_that_does_not_fit_is_refused_before_anything_is_drawn(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are named; nothing is written."""
    other = checkpoint(tmp_path / "model", CODEBOOK[::-1].copy())
    out = tmp_path / "o.png"
    words = ("generate", "--db", database, "--model", other, "-p", PROMPT, "--mode", "compare")
    code, _, err = run(capsys, *words, "-o", out)
    assert code == 1
    assert f"database {database}" in err
    assert f"does not fit generator {other}: their codebooks differ" in err
    assert not out.exists()


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`arrag` alone shows what there is."""
    code, text, _ = run(capsys, "--help")
    assert code == 0
    assert "generate" in text
