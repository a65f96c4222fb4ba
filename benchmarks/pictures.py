"""The pictures that benchmarks run on: taken from a folder or tars, laid out anew, or made up.

In: a path and a count. Out: encoded pictures as bytes, or a folder with them.
"""

import itertools
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord
from schemas.settings.source import SourceSettings
from stages.encode.decode import DecodeSettings, UndecodableError, decode_image

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dev"
"""Where the pictures are taken from unless told otherwise."""


def read_pictures(data: Path, count: int) -> list[bytes]:
    """The first `count` pictures below a folder, or in tars, that can be decoded."""
    from stages.sources import open_source

    if not data.exists():
        raise BadInputError(
            f"no pictures at '{data}'; name a folder of pictures or tars with --data"
        )
    tars = data.is_file() or any(data.rglob("*.tar"))
    source = open_source(
        SourceSettings(name="webdataset" if tars else "folder", input=(str(data),))
    )

    def usable() -> Iterator[bytes]:
        for item in (item for shard in source.listing([]).shards for item in source.read(shard)):
            if isinstance(item, ImageRecord):
                try:
                    decode_image(item.data, DecodeSettings())
                except UndecodableError:
                    continue
                yield item.data

    pictures = list(itertools.islice(usable(), count))
    if len(pictures) < count:
        raise BadInputError(f"{data} holds {len(pictures)} pictures, not {count}; ask for fewer")
    return pictures


def write_tars(pictures: Sequence[bytes], folder: Path, size: int) -> None:
    """The pictures as tars of `size`, keys counting from 0; Pillow goes by content, not by name."""
    folder.mkdir()
    for start in range(0, len(pictures), size):
        with tarfile.open(folder / f"{start:08d}.tar", "w") as archive:
            for row, data in enumerate(pictures[start : start + size], start):
                member = tarfile.TarInfo(f"{row:08d}.jpg")
                member.size = len(data)
                archive.addfile(member, BytesIO(data))


def synthetic_pictures(count: int) -> list[bytes]:
    """Seeded JPEGs of 640x480: smooth colours with some grain, about as heavy as photographs."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480))
        grain = rng.integers(-12, 13, (480, 640, 1), np.int16)
        stream = BytesIO()
        pixels = np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made
