"""A database of format 1, made by version 0.1.0, opens, verifies and answers as it did then.

tests/fixtures/format_1.tar.xz holds six of the bundled pictures, one of them held out, with a
codebook and a flat index; two pictures were removed afterwards, one of them with patches.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from arrag_runtime import PatchIndex
from arrag_runtime.format.ids import split_patch_ids
from pipeline.verify import verify

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1.tar.xz"
KEY = np.array([[5, 6, 7, 8]], np.uint16)
TOKENS = [2979, 2097, 3]
PATCH_IDS = [6816313727495702772, 6816313727495703002, 6816313727495701771]
DISTANCES = [0.55492574, 0.60148382, 0.81604683]
REMOVED = 6656556374507525


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database, unpacked. Read only."""
    folder = tmp_path_factory.mktemp("format_1")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "db"


def test_it_verifies(database: Path) -> None:
    """Also in full: keys, next tokens and indexes are what the grids say."""
    checks = verify(database, full=True)
    assert len(checks) > 15
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("name", ["codebook", "flat"])
def test_it_answers_as_it_did(database: Path, name: str) -> None:
    """The same entries at the same distances, and none of the removed picture."""
    index = PatchIndex.open(database, name)
    found = index.search(KEY, 3)
    assert found.tokens[0].tolist() == TOKENS
    assert found.patch_ids[0].tolist() == PATCH_IDS
    np.testing.assert_allclose(found.distances[0], DISTANCES, rtol=1e-5)
    everything = index.search(KEY, 2530)
    assert REMOVED not in split_patch_ids(everything.patch_ids[0][: everything.count[0]])[0]
