"""An indexing that ends at any change of its folder goes on to the same bytes, or starts again."""

import shutil
from pathlib import Path

import pytest

from arrag_runtime.format.manifest import IndexManifest, Layout
from pipeline.index import index
from pipeline.remove import RemovalRequest, carry_out, plan_removal
from pipeline.verify import verify
from schemas.settings.index import IndexSettings
from tests.worlds.index_world import STEPS_OF, WATCH, index_files, small_steps
from tests.worlds.removal_world import add_shard, make_database

CODES = IndexSettings(kind="codebook", lists=6, worker_memory=STEPS_OF, max_copies=1)
MORE = ([*range(18, 24)], [0, 1, 2, 30, 31, 32])


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)


def sound(layout: Layout) -> bool:
    return all(check.ok for check in verify(layout.root))


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the folder changes any more."""


def killed_at(moment: int, layout: Layout, settings: IndexSettings) -> None:
    """Index, and die at the moment-th change of the folder."""

    def react(count: int) -> None:
        if count >= moment:
            raise Killed

    with WATCH.changes(react), pytest.raises(Killed):
        index(layout.root, settings)


def changes_of(layout: Layout, settings: IndexSettings) -> int:
    """How many changes an undisturbed indexing makes."""
    with WATCH.changes(lambda _count: None):
        index(layout.root, settings)
    return WATCH.count


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A database whose index has two parts and must merge them with a third. Read only."""
    layout = make_database(tmp_path_factory.mktemp("growing") / "db")
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch)
        for number, contents in ((3, MORE[0]), (4, MORE[1])):
            index(layout.root, CODES)
            add_shard(layout, number, contents)
    return layout


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_a_build_goes_on_where_it_ended(
    growing: Layout, tmp_path: Path, share: float, fresh: bool
) -> None:
    """To the bytes of an undisturbed one, whether it is a first build or a growing one."""
    undisturbed = Layout(shutil.copytree(growing.root, tmp_path / "undisturbed"))
    disturbed = Layout(shutil.copytree(growing.root, tmp_path / "disturbed"))
    if fresh:
        shutil.rmtree(undisturbed.indexes)
        shutil.rmtree(disturbed.indexes)
    total = changes_of(undisturbed, CODES)
    assert total > 20
    killed_at(max(1, round(share * total)), disturbed, CODES)
    made = index(disturbed.root, CODES)
    assert index_files(disturbed, "codebook") == index_files(undisturbed, "codebook")
    assert made.parts == IndexManifest.read(undisturbed.index("codebook")).parts
    assert [path.name for path in Path(disturbed.indexes).iterdir()] == ["codebook"]
    assert sound(disturbed)


@pytest.mark.parametrize("change", ["memory", "removal", "table", "settings"])
def test_what_a_killed_build_left_is_not_mixed_with_another(
    growing: Layout, tmp_path: Path, change: str
) -> None:
    """Parts of another size, of other pictures, of another table version or other settings."""
    layout = Layout(shutil.copytree(growing.root, tmp_path / "db"))
    shutil.rmtree(layout.indexes)
    killed_at(18, layout, CODES)
    assert list(Path(layout.indexes).glob(".building-*/fill-*"))
    settings = CODES
    if change == "memory":
        settings = IndexSettings(kind="codebook", lists=6, worker_memory="300", max_copies=1)
    elif change == "removal":
        removal = plan_removal(layout.root, RemovalRequest(where="key LIKE '1/%'"))
        carry_out(layout.root, removal, "w", "c")
    elif change == "table":
        add_shard(layout, 6, [40, 41, 42, 43])
    else:
        settings = IndexSettings(kind="codebook", lists=5, worker_memory=STEPS_OF, max_copies=1)
    made = index(layout.root, settings)
    other = Layout(shutil.copytree(layout.root, tmp_path / "other"))
    shutil.rmtree(other.indexes)
    index(other.root, settings)
    assert made.parts == ("part-0000",)
    assert index_files(layout, "codebook") == index_files(other, "codebook")
    assert sound(layout)
