"""Places on disks and in buckets, and what moves between them."""

from datetime import timedelta
from pathlib import Path

import pytest

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.location import (
    building_folder,
    cache_folder,
    delete_place,
    exists,
    finish_replacements,
    in_store,
    join,
    local_folder,
    make_folder,
    names_in,
    put_folder,
    read_bytes,
    resolved_place,
    stored_bytes,
    write_bytes,
)
from arrag_runtime.format.manifest import Layout
from tests.worlds.command_line import run
from tests.worlds.servers.s3_server import free_port


@pytest.mark.parametrize(
    ("given", "known"),
    [("s3://b//x/y/", "s3://b/x/y"), ("gs://b", "gs://b"), ("/tmp/a/../b/", "/tmp/b")],
)
def test_a_place_has_one_spelling(given: str, known: str) -> None:
    assert resolved_place(given) == known
    assert Layout(given).root == known
    assert in_store(known) == ("://" in given)


def test_a_relative_path_is_of_the_working_folder() -> None:
    assert resolved_place("db") == str(Path.cwd() / "db")
    assert resolved_place("~/db") == str(Path.home() / "db")


@pytest.mark.parametrize("given", ["ftp://host/x", "s3://", "gs:///", "file:///tmp/x"])
def test_a_place_that_cannot_be_is_refused(given: str) -> None:
    with pytest.raises(BadInputError, match="BUCKET"):
        resolved_place(given)


def test_files_are_written_listed_and_taken_away(place: str) -> None:
    file = join(place, "deep", "file.json")
    assert not exists(place)
    assert names_in(place) == []
    with pytest.raises(FileNotFoundError):
        read_bytes(file)
    make_folder(join(place, "deep"))
    write_bytes(file, b"one")
    write_bytes(file, b"two!")
    write_bytes(join(place, "other"), b"12345")
    assert read_bytes(file) == b"two!"
    assert exists(file)
    assert exists(join(place, "deep"))
    assert names_in(place) == ["deep", "other"]
    assert stored_bytes(place) == 9
    delete_place(file)
    delete_place(file)
    assert not exists(file)
    delete_place(place)
    assert not exists(file)
    assert not exists(join(place, "other"))


def filled(folder: Path, mark: str, *more: str) -> None:
    for name in ("data.bin", "manifest.json", *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{mark} {name}")


def test_a_finished_draft_takes_the_place_of_an_older_folder(place: str) -> None:
    make_folder(place)
    final = join(place, "lists")
    draft = building_folder(place, "lists")
    filled(draft, "old", "parts/0")
    put_folder(draft, final)
    filled(draft, "new")
    assert read_bytes(join(final, "data.bin")) == b"old data.bin"
    put_folder(draft, final)
    assert not draft.exists()
    assert names_in(final) == ["data.bin", "manifest.json"]
    assert read_bytes(join(final, "manifest.json")) == b"new manifest.json"
    assert names_in(place) == ["lists"]


def test_a_replacement_that_was_killed_half_way_is_finished(tmp_path: Path) -> None:
    for name in (".old-kept", ".old-gone", "kept"):
        filled_folder = tmp_path / name
        filled_folder.mkdir()
        filled(filled_folder, name)
    finish_replacements(str(tmp_path))
    assert names_in(str(tmp_path)) == ["gone", "kept"]
    assert (tmp_path / "gone" / "data.bin").read_text() == ".old-gone data.bin"
    assert (tmp_path / "kept" / "data.bin").read_text() == "kept data.bin"


def test_a_folder_of_a_store_is_copied_once_and_again_when_it_changes(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARRAG_CACHE", str(tmp_path / "cache"))
    place = f"{bucket}/copied/lists"
    for mark in ("old", "new"):
        draft = building_folder(place, "lists")
        filled(draft, mark, "parts/0")
        put_folder(draft, place)
        copy = local_folder(place)
        assert (copy / "parts" / "0").read_text() == f"{mark} parts/0"
        (copy / "seen").touch()
        assert (local_folder(place) / "seen").exists()
        assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_on_a_disk_is_used_where_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("scheme", "server", "allow"),
    [
        ("s3", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"),
        ("gs", "GOOGLE_BASE_URL", "GOOGLE_ALLOW_HTTP"),
    ],
)
def test_plain_http_must_be_allowed(
    scheme: str, server: str, allow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and data would cross the network unencrypted."""
    monkeypatch.setenv(server, "http://127.0.0.1:1")
    monkeypatch.delenv(allow, raising=False)
    with pytest.raises(BadInputError, match=allow):
        exists(f"{scheme}://a-bucket-never-asked-for/x")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_does_not_answer_is_one_line(
    scheme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within seconds, with what to look at."""
    monkeypatch.setattr("arrag_runtime.format.location._PATIENCE", timedelta(seconds=1))
    for store, server in (("AWS", "ENDPOINT_URL"), ("GOOGLE", "BASE_URL")):
        monkeypatch.setenv(f"{store}_{server}", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv(f"{store}_ALLOW_HTTP", "true")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    code, _, err = run(capsys, "info", "--db", f"{scheme}://nobody-answers/db")
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 400
    assert "check the bucket's name, the network and the credentials" in err


def test_the_cache_is_where_it_is_asked_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As given, else as the environment says, else in the home; always an absolute path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARRAG_CACHE", "kept")
    assert cache_folder("given") == tmp_path / "given"
    assert cache_folder() == tmp_path / "kept"
    monkeypatch.delenv("ARRAG_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "arrag"
