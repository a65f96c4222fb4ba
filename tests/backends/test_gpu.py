"""What only a GPU can show. Run with `pytest -m gpu` on a machine with CUDA and faiss-gpu."""

from pathlib import Path

import numpy as np
import pytest

from arrag_runtime import PatchIndex
from arrag_runtime.search.faiss_search import has_gpu
from tests.worlds.patch_world import build_index, check_neighbors, make_world

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    pytest.importorskip("autofaiss")
    assert has_gpu(), "faiss sees no GPU: install faiss-gpu, and run on a machine with CUDA"


def test_an_ivfpq_index_is_trained_filled_and_searched_on_a_gpu(tmp_path: Path) -> None:
    """It finds the entries that the same lists and codes hold, with their tokens."""
    world = make_world(tmp_path, 3, 20)
    build_index(world, "lists", kind="ivfpq", index_key="IVF4,PQ4x8")
    opened = PatchIndex.open(world.layout.root, "lists")
    opened.nprobe = 4
    found = opened.search(world.keys[::40], 10)
    check_neighbors(found, world, 10)
    assert (found.count == 10).all()
    near = ((world.vectors[::40, None] - world.vectors[None]) ** 2).sum(axis=2)
    tenth = np.partition(near, 9, axis=1)[:, 9]
    at = {int(i): n for n, i in enumerate(world.ids)}
    rows = np.vectorize(at.__getitem__)(found.patch_ids)
    assert (np.take_along_axis(near, rows, axis=1) <= tenth[:, None] + 0.1).mean() > 0.5


def test_beyond_the_kernels_limit_the_cpu_searches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(tmp_path, 3, 20)
    build_index(world, "lists", kind="ivfpq", index_key="IVF4,PQ4x8")
    opened = PatchIndex.open(world.layout.root, "lists")
    found = opened.search(world.keys[:3], 2049)
    check_neighbors(found, world, 2049)
    assert "the CPU searches" in caplog.text
