"""Options of the commands: what they are taken from, files of them, help, completion."""

import os
import subprocess
import sys
from dataclasses import MISSING
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main

import cli
from arrag_runtime.generation.settings import GenerateSettings
from arrag_runtime.settings import make, read_toml, settings_of, to_toml, values_of
from arrag_runtime.training.settings import TrainSettings
from schemas.settings.build import BuildSettings
from schemas.settings.evaluate import EvaluateSettings
from schemas.settings.index import IndexSettings
from schemas.settings.plan import DoctorSettings, ForecastSettings
from schemas.settings.query import QuerySettings
from schemas.settings.source import SourceSettings
from schemas.settings.trainset import TrainsetSettings
from tests.worlds import command_line

TAKEN: dict[str, Any] = {
    "build": BuildSettings,
    "index": IndexSettings,
    "query": QuerySettings,
    "evaluate": EvaluateSettings,
    "plan": ForecastSettings,
    "doctor": DoctorSettings,
    "trainset": TrainsetSettings,
    "generate": GenerateSettings,
    "train": TrainSettings,
}
OWN = {
    "build": {"--index"},
    "index": {"--db", "--name", "--min-recall", "--ray"},
    "query": {"--sheet", "--table"},
    "evaluate": {"--plot"},
    "trainset": {"--export"},
    "generate": {"--out", "--trace", "--trace-sheet"},
}
"""What commands declare themselves: where the result goes, and what a class of settings leaves open."""
EVERY = {"--json", "--quiet", "--config", "--print-config", "--help"}
COMMANDS: dict[str, Any] = {
    name: command
    for app in (cli.app, cli.runtime)
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
NEEDED = {
    "build": ["--source", "sample"],
    "plan": ["--source", "sample"],
    "generate": ["--prompt", "a hat"],
    "train": ["--data", "set", "--out", "run"],
}
every_command = pytest.mark.parametrize("name", TAKEN)


def run(capsys: pytest.CaptureFixture[str], name: str, *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    program = "arrag" if name in ("generate", "train") else "arrag-db"
    return command_line.run(capsys, name, *words, program=program)


def in_force(capsys: pytest.CaptureFixture[str], name: str, *words: str | Path) -> list[str]:
    """The lines of --print-config."""
    code, out, err = run(capsys, name, *words, "--print-config")
    assert (code, err) == (0, "")
    return out.splitlines()


@every_command
def test_options_are_the_fields_of_the_settings(name: str) -> None:
    """None without a field but a command's own, with the field's default and bounds."""
    parameters = {p.opts[0] if len(p.opts) == 1 else flag(p.opts): p for p in COMMANDS[name].params}
    offered = {setting.flag: setting for setting in settings_of(TAKEN[name])}
    own = OWN.get(name, set()) | EVERY - {"--help"}
    if name in ("plan", "doctor"):
        own -= {"--quiet"}
    assert parameters.keys() == offered.keys() | own
    assert not offered.keys() & own
    for flag_, setting in offered.items():
        parameter = parameters[flag_]
        assert parameter.required == (setting.default is MISSING)
        if not setting.many and setting.default is not MISSING:
            assert parameter.default == setting.default
        assert parameter.envvar == setting.option.env


def flag(names: list[str]) -> str:
    """The long one of an option's names."""
    return next(name for name in names if name.startswith("--"))


@every_command
def test_help_shows_every_default_in_panels(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    lines = {words[0]: line for line in out.splitlines() if (words := line.strip("│* ").split())}
    for setting in settings_of(TAKEN[name]):
        line = lines[setting.flag]
        assert setting.help in line
        for choice in setting.choices:
            assert choice in line
        shown = f"({setting.option.shown})" if setting.option.shown else setting.default
        if shown not in (None, False, (), MISSING):
            value = setting.typed(shown) if isinstance(shown, tuple) else shown
            value = ", ".join(value) if isinstance(value, list) else value
            assert f"[default: {str(value).lstrip('-')}]" in line
        if setting.panel:
            assert f"─ {setting.panel} ─" in out


@every_command
def test_what_is_printed_is_read_back(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = NEEDED.get(name, [])
    (tmp_path / "a.toml").write_text("\n".join(in_force(capsys, name, *words)))
    again = in_force(capsys, name, "--config", tmp_path / "a.toml")
    assert again == in_force(capsys, name, *words)
    own = {own.lstrip("-") for own in OWN.get(name, set()) | EVERY}
    read = read_toml(TAKEN[name], tmp_path / "a.toml", others=own)
    made = make(TAKEN[name], {key: value for key, value in read.items() if key not in own})
    assert set(to_toml(values_of(made)).splitlines()) <= set(again)


def test_what_is_typed_wins_over_the_environment_and_that_over_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "build.toml"
    file.write_text(
        "source = 'folder'\ninput = ['a', 'b']\ndb = 'from-file'\nmin_side = 48\nindex = false\n"
        "retry-rejects = ['dns', 'timeout']\n"
    )
    asked = in_force(capsys, "build", "--config", file)
    assert set(asked) >= {
        'source = "folder"',
        'input = ["a", "b"]',
        'db = "from-file"',
        "min-side = 48",
        "index = false",
        "max-pixels = 80000000",
        'retry-rejects = ["dns", "timeout"]',
    }
    monkeypatch.setenv("ARRAG_DB", "from-environment")
    assert 'db = "from-environment"' in in_force(capsys, "build", "--config", file)
    words = ("--db", "typed", "--min-side", "9", "-i", "c", "--index", "--config", file)
    assert set(in_force(capsys, "build", *words)) >= {
        'db = "typed"',
        "min-side = 9",
        'input = ["c"]',
        "index = true",
    }


def test_a_file_of_names_that_are_no_identifiers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """-n, --lambda and --from are named as they are typed."""
    file = tmp_path / "a.toml"
    file.write_text("n = 3\nlambda = 0.2\nprompt = ['x']\ntrace-sheet = 't.png'\n")
    lines = in_force(capsys, "generate", "--config", file)
    assert {"n = 3", "lambda = 0.2", 'trace-sheet = "t.png"'} <= set(lines)
    file.write_text("from = 'database'\n")
    assert 'from = "database"' in in_force(capsys, "trainset", "--config", file)


def test_a_file_with_a_mistake_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.toml"
    for text in ("sources = 'x'", "limit = 'x'", "limit = -1", "limit ="):
        file.write_text(text)
        code, out, err = run(capsys, "build", "--config", file)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: --config '{file}'")
        assert err.count("\n") == 1
    code, _, err = run(capsys, "build", "--config", tmp_path / "gone")
    assert (code, err.count("\n")) == (1, 1)


@every_command
def test_a_wrong_choice_or_number_is_exit_code_2(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in settings_of(TAKEN[name]):
        wrong = ["nonsense"] if setting.choices or setting.type is float else []
        if setting.option.minimum is not None:
            wrong.append(str(setting.option.minimum - 1))
        for value in wrong:
            code, out, err = run(capsys, name, *NEEDED.get(name, []), setting.flag, value)
            assert (code, out) == (2, "")
            assert setting.flag in err


def test_parts_of_a_source_need_the_source(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("doctor", "trainset"):
        code, out, err = run(capsys, name, "--input", "x")
        assert (code, out) == (1, "")
        assert err == "error: --input says more about a --source; give --source too\n"


def test_a_pipelines_settings_are_the_same_wherever_an_option_stands() -> None:
    """An option that two commands share has one default: -n is not 4 here and 1 there."""
    sources = {s.key: s for s in settings_of(SourceSettings)}
    for name in ("build", "plan", "doctor"):
        for setting in settings_of(TAKEN[name]):
            if setting.home is SourceSettings and setting.key != "source":
                assert setting.default == sources[setting.key].default


@pytest.mark.parametrize("program", [cli.main, cli.main_runtime])
def test_the_version_is_printed(
    program: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["arrag", "--version"])
    with pytest.raises(SystemExit) as end:
        program()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{version('arrag')}\n"


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("arrag-db bui", "build"),
        ("arrag-db build --neigh", "--neighborhood"),
        ("arrag-db build --border z", "zero"),
    ],
)
def test_the_shell_completes_commands_options_and_choices(typed: str, found: str) -> None:
    code = "import sys, cli; sys.argv = ['arrag-db']; cli.main()"
    asked = {
        "_ARRAG_DB_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == [found]
