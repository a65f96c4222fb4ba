"""From a list to a database over a web with faults, as a user does it: build, try again, verify."""

import json
from pathlib import Path

import pytest

from tests.worlds.command_line import run as command
from tests.worlds.database_rows import all_rows
from tests.worlds.servers.web import serve
from tests.worlds.servers.web_like import faulty_pages, mended_pages, write_list

LINKS = 60
OPTIONS = ("--allow-private-hosts", "--timeout", "6", "--shard-size", "25", "--no-index")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints; it must not fail."""
    code, out, err = command(capsys, *words)
    assert code == 0, err
    return out


@pytest.mark.slow
def test_it_adds_up_before_and_after_the_web_is_mended(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, db = tmp_path / "sample.tsv", str(tmp_path / "db")
    build = ("build", "--source", "cc12m", "--input", str(listed), "--db", db, *OPTIONS)
    rejects = {"http-404": 4, "http-5xx": 1, "broken-response": 1, "timeout": 6}
    rejects |= {"not-an-image": 2, "empty": 2, "truncated": 1, "disallowed": 1}
    with serve(faulty_pages(LINKS)) as web:
        write_list(listed, web, LINKS)
        with listed.open("ab") as stream:
            stream.write(b"no address and no tab\n\xff\xfe\tno text\nfile:///etc/passwd\ta file\n")
            stream.write(b"http://nobody@127.0.0.1/\ta name\n")
        rejects |= {"bad-line": 2, "bad-url": 2}
        out = run(capsys, *build)
        assert "64 inputs = 42 images + 22 rejects; 0 held out, 21,252 patches" in out
        assert {f"  rejected {n}: {reason}" for reason, n in rejects.items()} <= {*out.splitlines()}
        check(capsys, db, 64, rejects)
        web.pages.update(mended_pages(LINKS))
        web.pages["/0.jpg"] = faulty_pages(1)["/0.jpg"]
        asked = len(web.requests)
        out = run(capsys, *build, "--retry-rejects", "timeout, http-404,http-5xx,truncated")
        assert "12 rejects tried again = 11 images + 1 rejects;" in out
        assert len(web.requests) == asked + 12
        left = {"broken-response": 1, "not-an-image": 2, "empty": 2, "disallowed": 1}
        left |= {"bad-line": 2, "bad-url": 2, "http-404": 1}
        check(capsys, db, 64, left)
        again = ("--retry-rejects", "not-an-image,empty,disallowed,broken-response,bad-line")
        assert "8 rejects tried again = 6 images + 2 rejects;" in run(capsys, *build, *again)
        check(capsys, db, 64, {"bad-line": 2, "bad-url": 2, "http-404": 1})
        assert run(capsys, *build, "--retry-rejects", "timeout").startswith(
            "nothing to do: no open rejects with timeout"
        )
    images = all_rows(Path(db))["images"].to_pylist()
    assert sorted(int(row["caption"].split()[-1]) for row in images) == list(range(1, LINKS))
    assert len({str(row["tokens"]) for row in images}) > LINKS / 2


def check(
    capsys: pytest.CaptureFixture[str], db: str, inputs: int, rejects: dict[str, int]
) -> None:
    """The ledger, the rejects and the tables say the same, and `verify` agrees."""
    fields = json.loads(run(capsys, "info", "--db", db, "--json"))
    assert fields["inputs"] == inputs == fields["images"] + sum(rejects.values())
    assert fields["rejects"] == rejects
    assert json.loads(run(capsys, "verify", "--db", db, "--full", "--json"))["ok"] is True
