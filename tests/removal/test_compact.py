"""Compaction: bytes that are deleted, counts that add up, and what an interruption leaves."""

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import pipeline.compact
import pipeline.remove
from arrag_runtime.format.errors import DatabaseBusyError
from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import IndexManifest, Layout, read_codebook
from pipeline.compact import compact
from pipeline.index import index
from pipeline.info import info
from pipeline.remove import RemovalRequest
from pipeline.resources.lease import lease
from pipeline.verify import verify
from schemas.settings.index import IndexSettings
from stages.index.index_contents import index_contents
from stages.tables.committer import Committer
from stages.tables.ledger import read_ledger
from tests.worlds.command_line import run
from tests.worlds.removal_world import KEYS, add_shard, make_database, shard_of, write_shard


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Four shards of six pictures, two of them copies, with an index and two removals."""
    made = make_database(tmp_path / "db")
    add_shard(made, 3, [3, 100, 101, 102, 103, 104])
    index(made.root, IndexSettings())
    remove(made, "key = '0/3.jpg'")
    remove(made, "shard LIKE '%2%' OR key LIKE '2/1%'")
    return made


def remove(layout: Layout, where: str) -> tuple[int, ...]:
    """Remove what a condition holds for; the ids of those pictures."""
    return pipeline.remove.remove(layout.root, RemovalRequest(where=where), why="why").image_ids


def removed_ids(layout: Layout) -> set[int]:
    table = lance.dataset(layout.removed).to_table(filter="image_id IS NOT NULL")
    return set(table["image_id"].to_pylist())


def tables(layout: Layout) -> dict[str, pa.Table]:
    """The rows of images and patches in the order of their ids."""
    return {
        "images": lance.dataset(layout.images).to_table().sort_by("image_id"),
        "patches": lance.dataset(layout.patches(KEYS)).to_table().sort_by("patch_id"),
    }


def without(rows: dict[str, pa.Table], removed: set[int]) -> dict[str, pa.Table]:
    """What is left of the rows without these pictures, found by a loop."""
    images, patches = rows["images"], rows["patches"]
    stays = [image not in removed for image in images["image_id"].to_pylist()]
    owned = [patch >> 10 not in removed for patch in patches["patch_id"].to_pylist()]
    return {"images": images.filter(pa.array(stays)), "patches": patches.filter(pa.array(owned))}


def held(layout: Layout, name: str) -> list[int]:
    """The patch ids that an index holds, ascending, those of copies too."""
    manifest = IndexManifest.read(layout.index(name))
    blocks = index_contents(Path(layout.index(name)), manifest, read_codebook(layout))
    return sorted(patch for block in blocks for patch in block.patch_ids.tolist())


def wrong(layout: Layout) -> list[str]:
    """The names of the checks that fail."""
    return [check.name for check in verify(layout.root, full=True) if not check.ok]


def counts(layout: Layout) -> dict[str, Any]:
    """What `info` counts, but for what still waits to be compacted."""
    names = ("inputs", "images", "heldout", "patches", "rejects", "removed", "duplicates")
    fields = info(layout.root)
    return {name: fields[name] for name in names}


def test_rows_of_removed_pictures_are_deleted_and_no_others(layout: Layout) -> None:
    before, removed, said = tables(layout), removed_ids(layout), counts(layout)
    assert wrong(layout) == []
    assert said["removed"] == len(removed) == 9
    done = compact(layout.root)
    expected = without(before, removed)
    for name, rows in tables(layout).items():
        assert rows.equals(expected[name]), name
    assert done.images == len(before["images"]) - len(expected["images"]) == 9
    assert done.patches == len(before["patches"]) - len(expected["patches"]) > 0
    assert wrong(layout) == []
    assert counts(layout) == said
    assert said["inputs"] == said["images"] + said["removed"] + sum(said["rejects"].values())
    assert info(layout.root)["removed_waiting"] == 0


def test_no_file_holds_their_bytes_any_more(layout: Layout) -> None:
    """Captions and grids are in no list and no receipt, so nothing of them may be left."""

    def holding(text: bytes) -> set[str]:
        files = (path for path in Path(layout.root).rglob("*") if path.is_file())
        return {path.name for path in files if text in path.read_bytes()}

    table = lance.dataset(layout.patches(KEYS))
    old = {Path(f.path).name for fragment in table.get_fragments() for f in fragment.data_files()}
    leftover = write_shard(layout, 9, [3])
    assert leftover.images == 1
    assert holding(b"caption of picture 3")
    assert holding(b"caption of picture 4")
    compact(layout.root)
    assert not holding(b"caption of picture 3")
    assert holding(b"caption of picture 4")
    left = {path.name for path in (Path(layout.patches(KEYS)) / "data").iterdir()}
    assert not left & old
    assert len(left) == 1
    assert len(list((Path(layout.patches(KEYS)) / "_versions").glob("*.manifest"))) == 1


@pytest.mark.parametrize(
    "settings",
    [
        IndexSettings(kind="codebook"),
        IndexSettings(kind="codebook", max_copies=1),
        IndexSettings(kind="flat"),
    ],
)
def test_indexes_hold_nothing_of_them(layout: Layout, settings: IndexSettings) -> None:
    name = str(settings.kind)
    remove(layout, "key = '2/4.jpg'")
    shutil.rmtree(layout.indexes)
    table = lance.dataset(layout.removed)
    listed = table.to_table()
    table.delete("true")
    index(layout.root, settings)
    everything = held(layout, name)
    lance.write_dataset(listed, layout.removed, mode="append")
    removed = removed_ids(layout)
    assert {patch >> 10 for patch in everything} & removed
    assert compact(layout.root).indexes == (name,)
    assert held(layout, name) == [patch for patch in everything if patch >> 10 not in removed]
    assert held(layout, name) == tables(layout)["patches"]["patch_id"].to_pylist()
    assert wrong(layout) == []
    assert compact(layout.root).indexes == ()


def test_an_index_behind_its_table_is_brought_up_to_date(layout: Layout) -> None:
    """It lacks rows that the compaction moves, and must not be taken for one that has them."""
    add_shard(layout, 4, [300, 301, 302])
    assert len(held(layout, "codebook")) < len(tables(layout)["patches"])
    compact(layout.root)
    assert held(layout, "codebook") == tables(layout)["patches"]["patch_id"].to_pylist()
    assert wrong(layout) == []


def test_small_fragments_are_merged_without_any_removal(tmp_path: Path) -> None:
    layout = make_database(tmp_path / "db", shards=5)
    before = tables(layout)
    assert len(lance.dataset(layout.images).get_fragments()) == 5
    done = compact(layout.root)
    assert (done.images, done.patches, done.indexes) == (0, 0, ())
    for name, rows in tables(layout).items():
        assert rows.equals(before[name])
    for path in (layout.images, layout.patches(KEYS), layout.rejects):
        assert len(lance.dataset(path).get_fragments()) == 1
    # The row that ends the compaction comes after the ledger itself was merged.
    assert len(lance.dataset(layout.ledger).get_fragments()) == 2
    assert wrong(layout) == []


def test_everything_may_be_removed(tmp_path: Path) -> None:
    layout = make_database(tmp_path / "db")
    index(layout.root, IndexSettings())
    remove(layout, "true")
    assert compact(layout.root).images == 18
    assert {name: len(rows) for name, rows in tables(layout).items()} == {"images": 0, "patches": 0}
    assert not exists(layout.index("codebook"))
    assert wrong(layout) == []
    add_shard(layout, 5, [200, 201])
    assert wrong(layout) == []


def test_rows_deleted_before_do_not_shift_what_is_deleted(layout: Layout) -> None:
    """The places of rows in a fragment count deleted ones."""
    lance.dataset(layout.images).delete("key = '1/0.jpg'")
    before, removed = tables(layout), removed_ids(layout)
    compact(layout.root)
    assert tables(layout)["images"].equals(without(before, removed)["images"])


def test_marks_of_the_ledger_cover_the_new_fragments(layout: Layout) -> None:
    """So that the next start looks at no fragment of the compaction as if a build had left it."""
    compact(layout.root)
    state = read_ledger(layout)
    assert not state.compacting
    for name, path in (("images", layout.images), ("patches", layout.patches(KEYS))):
        fragments = lance.dataset(path).get_fragments()
        assert state.marks[name] == max(fragment.fragment_id for fragment in fragments)


def test_a_build_after_a_compaction(layout: Layout) -> None:
    compact(layout.root)
    add_shard(layout, 4, [300, 301])
    assert wrong(layout) == []
    rows = tables(layout)
    assert {"4/0.jpg", "4/1.jpg"} <= set(rows["images"]["key"].to_pylist())


def test_a_killed_build_after_a_compaction_loses_its_rows_and_no_others(layout: Layout) -> None:
    compact(layout.root)
    before = tables(layout)
    committer = Committer(layout, KEYS)
    committer.plan([shard_of(4)])
    result = write_shard(layout, 4, [300, 301])
    for name in ("patches", "images"):
        committer._append(name, result.fragments[name])
    assert len(tables(layout)["images"]) == len(before["images"]) + 2
    assert Committer(layout, KEYS).recover(read_ledger(layout)) == 2 + result.patches
    for name, rows in tables(layout).items():
        assert rows.equals(before[name])
    assert wrong(layout) == []


def test_a_busy_database_is_left_alone(layout: Layout) -> None:
    with lease(layout, "arrag-db build"), pytest.raises(DatabaseBusyError, match="arrag-db build"):
        compact(layout.root)


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def interrupt_at(moment: int, end: Callable[[], None], patch: Callable[..., None]) -> None:
    """Make the next compaction end before its step `moment`, counted over all kinds of steps."""
    seen = Counter[str]()

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if seen.total() == moment:
                end()
            seen["steps"] += 1
            return step(*arguments, **options)

        return run

    for name in ("delete_images", "compact_table", "index"):
        patch(pipeline.compact, name, counted(getattr(pipeline.compact, name)))
    patch(Committer, "end_compaction", counted(Committer.end_compaction))


def interrupted(layout: Layout, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction that ends before this step."""

    def end() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        interrupt_at(moment, end, patch.setattr)
        with pytest.raises(Killed):
            compact(layout.root)


MOMENTS = range(9)
"""Before: delete and rewrite patches, delete and rewrite images, rewrite three others, end, index."""


@pytest.mark.parametrize(("moment", "then"), [(1, "build"), (3, "compact"), (7, "build")])
def test_an_interrupted_compaction_is_repeated(
    layout: Layout, moment: int, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, removed, said = tables(layout), removed_ids(layout), counts(layout)
    interrupted(layout, moment, monkeypatch)
    check_recovery(layout, before, removed, said, then)


def check_recovery(
    layout: Layout, before: dict[str, pa.Table], removed: set[int], said: dict[str, Any], then: str
) -> None:
    """After an interruption nothing is lost, and a compaction ends as if nothing had happened."""
    assert counts(layout)["images"] == said["images"]
    more = set()
    if then == "build":
        add_shard(layout, 4, [300, 301])
        assert not read_ledger(layout).compacting
        more = {"4/0.jpg", "4/1.jpg"}
        said = counts(layout)
        before["images"] = pa.concat_tables(
            [before["images"], lance.dataset(layout.images).to_table(filter="key LIKE '4/%'")]
        ).sort_by("image_id")
    late = remove(layout, "key = '3/3.jpg'")
    assert len(late) == 1
    compact(layout.root)
    rows, expected = tables(layout), without(before, removed | set(late))
    assert rows["images"].equals(expected["images"])
    assert more <= set(rows["images"]["key"].to_pylist())
    owners = np.unique(rows["patches"]["patch_id"].to_numpy() >> 10)
    kept = rows["images"].filter(pa.compute.equal(rows["images"]["split"], "database"))
    assert owners.tolist() == kept["image_id"].to_pylist()
    assert wrong(layout) == []
    after = counts(layout)
    assert after["removed"] == len(removed) + 1
    assert after["images"] == said["images"] - 1
    assert held(layout, "codebook") == rows["patches"]["patch_id"].to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_compaction_is_repeated(layout: Layout, moment: int) -> None:
    before, removed, said = tables(layout), removed_ids(layout), counts(layout)
    code = (
        "import os, pathlib, signal, sys\n"
        "from pipeline.compact import compact\n"
        "from tests.removal.test_compact import interrupt_at\n"
        "interrupt_at(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL), setattr)\n"
        "compact(pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, layout.root, str(moment)], check=False)
    assert done.returncode == -signal.SIGKILL
    check_recovery(layout, before, removed, said, "build" if moment % 2 else "compact")


def test_verify_names_what_an_interrupted_compaction_left(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(layout, 0, monkeypatch)
    checks = {check.name: check for check in verify(layout.root)}
    assert not checks["deleted pictures are out of the tables"].ok
    assert "run `arrag-db compact` again" in checks["deleted pictures are out of the tables"].detail


def test_the_command(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "compact", "--db", layout.root)
    assert code == 0
    assert out.startswith("deleted 9 pictures with ")
    assert out.endswith("; built again: codebook\n")
