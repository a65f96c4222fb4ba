"""Indexing by tasks of a Ray cluster makes the bytes that this process makes alone."""

import shutil
from pathlib import Path

import pytest

from arrag_runtime.format.manifest import Layout
from pipeline.index import index
from schemas.settings.index import IndexSettings
from schemas.settings.resources import RayResources
from tests.worlds.index_world import STEPS_OF, index_files, small_steps
from tests.worlds.removal_world import add_shard, make_database


def test_tasks_make_the_same_bytes(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first build of several fills and slices, and one that grows and merges."""
    small_steps(monkeypatch)
    alone = make_database(tmp_path / "alone", shards=4)
    together = Layout(shutil.copytree(alone.root, tmp_path / "together"))
    settings = IndexSettings(kind="codebook", lists=6, worker_memory=STEPS_OF, max_copies=1)
    told: list[tuple[str, int, int]] = []
    for number in range(4, 7):
        told.clear()
        one = index(alone.root, settings)
        other = index(
            together.root,
            settings,
            resources=RayResources(),
            progress=lambda *step: told.append(step),
        )
        assert index_files(alone, "codebook") == index_files(together, "codebook")
        assert (one.parts, one.count, one.recall_at_10) == (
            other.parts,
            other.count,
            other.recall_at_10,
        )
        for step in ("filling the lists", "merging the lists"):
            counted = [(done, total) for name, done, total in told if name == step]
            assert counted[0][0] == 0
            assert counted[-1][0] == counted[-1][1] > 0
        for layout in (alone, together):
            add_shard(layout, number, [number, number, 7, 8, 50 + number, 60 + number])
