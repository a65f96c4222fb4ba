"""Whether a database fits a generator: what is the same, what is refused, and that both are named."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arrag_runtime.backends.compatibility import require_fit
from arrag_runtime.format.errors import BadInputError, IncompatibleError
from arrag_runtime.format.manifest import DatabaseManifest, EncoderSettings, Layout, write_codebook
from arrag_runtime.format.neighborhood import SURROUND_1
from arrag_runtime.format.specs import KeySpec, key_spec, normalised
from tests.worlds.patch_world import CODES, SPEC

MANIFEST = DatabaseManifest(
    SPEC, None, EncoderSettings("cpu", "float32", 1), key_spec("causal-1", "skip", "codebook"), 0.0
)


@pytest.fixture
def database(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "db")
    Path(layout.root).mkdir()
    write_codebook(layout, CODES)
    MANIFEST.write(layout)
    return layout


def generator(codes: Any = CODES, grid: tuple[int, int] = (7, 7)) -> Any:
    """What the check asks of a backend."""
    return SimpleNamespace(name="toy-generator", grid=grid, codebook=lambda: codes)


def test_the_same_codes_fit_whatever_their_file_and_precision(database: Layout) -> None:
    """Half precision moves every code a little; 0.999 of cosine lets it pass."""
    half = normalised((CODES * 3).astype(np.float16))
    assert not np.array_equal(half, CODES)
    assert require_fit(database.root, generator(half)) == MANIFEST


def turned(by: float) -> Any:
    """The codebook with one row turned by an angle."""
    codes = CODES.astype(np.float64).copy()
    aside = np.eye(4)[0] - codes[5] * codes[5, 0]
    codes[5] = np.cos(by) * codes[5] + np.sin(by) * aside / np.linalg.norm(aside)
    return codes.astype(np.float32)


def test_one_row_decides(database: Layout) -> None:
    """The cosine of one row just above 0.999 fits, just below it does not."""
    edge = float(np.arccos(0.999))
    require_fit(database.root, generator(turned(edge * 0.98)))
    with pytest.raises(IncompatibleError, match=r"lowest cosine of a row 0\.99\d+, needed 0\.999"):
        require_fit(database.root, generator(turned(edge * 1.02)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (generator(normalised(np.ones((32, 4)))), "32 codes x 4"),
        (generator(normalised(np.ones((24, 8)))), "24 codes x 8"),
        (generator(grid=(8, 7)), "grid is 8x7"),
        (generator(CODES[::-1]), "their codebooks differ"),
        (generator(np.full_like(CODES, np.nan)), "their codebooks differ"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_named(
    database: Layout, other: Any, message: str
) -> None:
    """The database, its tokenizer, the generator, what differs, and what to do."""
    with pytest.raises(IncompatibleError, match=message) as caught:
        require_fit(database.root, other)
    for named in (str(database.root), "toy (7x7 grid", "toy-generator", "arrag-db build"):
        assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neighbours_that_come_later_are_refused(database: Layout) -> None:
    """Keys of all sides cannot be asked for in reading order."""
    with pytest.raises(IncompatibleError, match="surround-1 need tokens that come later"):
        require_fit(database.root, generator(), SURROUND_1)
    replace(MANIFEST, keys=KeySpec(SURROUND_1)).write(database)
    with pytest.raises(IncompatibleError, match=r"surround-1.*--neighborhood causal-1"):
        require_fit(database.root, generator())


def test_a_database_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the command that builds one."""
    with pytest.raises(BadInputError, match=r"no database at .*nowhere.*arrag-db build"):
        require_fit(tmp_path / "nowhere", generator())
