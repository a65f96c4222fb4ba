"""A command as a user types it, run in this process: its exit code and what it said."""

import sys

import pytest

from cli import main, main_runtime

PROGRAMS = {"arrag-db": main, "arrag": main_runtime}


def run(
    capsys: pytest.CaptureFixture[str], *words: object, program: str = "arrag-db"
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command of a program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, words)])
        code = 0
        try:
            PROGRAMS[program]()
        except SystemExit as end:
            code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
