"""One Ray cluster for the whole suite, pictures on disk, and databases built from them."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pipeline.build import BuildReport, build
from schemas.settings.build import BuildSettings
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings

SHARD_SIZE = 4


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A private cluster with two CPUs, which builds in this process use."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def write_picture(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> None:
    """A picture of soft coloured blobs, different for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path, quality=92)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten good pictures, two of them with captions, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(10):
        write_picture(folder / f"{'deep/' if seed % 3 == 0 else ''}{seed:02}.jpg", seed)
    (folder / "01.txt").write_text("a red blob\n")
    (folder / "02.txt").write_text("a blue blob")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404 not found</html>")
    (folder / "half.png").write_bytes((folder / "01.jpg").read_bytes()[:900])
    return folder


def settings(database: Path, pictures: Path, **changes: object) -> BuildSettings:
    """Build settings for a folder with the bundled tokenizer and small shards."""
    fields: dict[str, object] = {
        "database": database,
        "source": SourceSettings(name="folder", input=(str(pictures),), shard_size=SHARD_SIZE),
        "resources": RayResources(workers=2),
    }
    return BuildSettings(**fields | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def built(ray_session: None, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the pictures, with a share held out. Read only."""
    database = tmp_path_factory.mktemp("built") / "db"
    report = build(settings(database, pictures, hold_out=0.3))
    assert not report.failed
    return database


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of the built database that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "db"))


@pytest.fixture(scope="session")
def repeated(
    built: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BuildReport]:
    """The built database with two of its pictures again and an empty one, from a tar; the report of that build.

    01 is held out, 05 is not. Read only.
    """
    folder = tmp_path_factory.mktemp("repeated")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("01.jpg", "01.txt", "05.jpg", "empty.jpg"):
            tar.add(pictures / name, name)
    database = Path(shutil.copytree(built, folder / "db"))
    source = SourceSettings(name="webdataset", input=(str(folder / "a.tar"),))
    return database, build(settings(database, pictures, source=source))
