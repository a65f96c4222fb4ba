"""Shared fixtures: pictures made from a seed, and a narrow tokenizer with random weights."""

import io
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from PIL import Image

from tests.worlds.servers import gcs_server, s3_server

# One thread each for torch and faiss: on a busy machine their threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_THREAD_LIMIT", "1")
settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("suite")

MODELS = ("backends", "faid", "generation", "tokenizers", "training", "test_generate.py")
"""Rooms and files whose tests load transformers, which takes seconds in each process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name what one process of pytest-xdist runs: all on the Ray session, all on transformers.

    Anything else stays together by file. The Ray session's tests take longest, so they come first.
    """
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: {"ray": 0, "models": 1}.get(groups[item], 2))


def _group(item: pytest.Item) -> str:
    asked: tuple[str, ...] = getattr(item, "fixturenames", ())
    if "ray_session" in asked:
        return "ray"
    if "model" in asked or not set(MODELS).isdisjoint(item.path.parts):
        return "models"
    return "-".join(item.path.relative_to(Path(__file__).parent).parts)


@pytest.fixture(scope="session", autouse=True)
def few_queries() -> Iterator[None]:
    """Certify indexes with 60 queries, not a thousand: most of what indexing a small table costs.

    Where no selected test indexes anything, nothing is loaded for it.
    """
    if (index := sys.modules.get("pipeline.index")) is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_QUERIES", 60)
        yield


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """An RGB picture of soft colours with a little noise; another one for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    noisy = soft + rng.integers(-20, 21, soft.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture file of this format."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(seed: int, width: int = 96, height: int = 80) -> bytes:
    """The bytes of a small JPEG; other bytes for every seed."""
    return encoded(picture(seed, width, height), "JPEG")


def pixels(seed: int, size: int = 384) -> npt.NDArray[np.uint8]:
    """A prepared picture uint8 [size, size, 3]."""
    return np.array(picture(seed, size, size))


def narrow_model(
    multiplier: Sequence[int] = (1, 1, 1, 1, 1), blocks: int = 1, seed: int = 0
) -> Any:
    """A JanusVQVAE of VQ-16's architecture, narrow, with random weights and a raw codebook."""
    import torch
    from transformers import JanusVQVAE, JanusVQVAEConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=8,
                num_embeddings=256,
                latent_channels=32,
                base_channels=32,
                channel_multiplier=list(multiplier),
                num_res_blocks=blocks,
                num_patches=24,
            )
        ).eval()


@pytest.fixture(scope="session")
def model() -> Any:
    """The narrow model whose weights `narrow_weights` holds."""
    return narrow_model()


@pytest.fixture(scope="session")
def narrow_weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file of a narrow VQ-16, in transformers' names."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tokenizer(narrow_weights: Path) -> Any:
    """The narrow tokenizer on the CPU in float32; nobody may set it up otherwise."""
    from arrag_runtime.tokenizers import load_tokenizer

    loaded = load_tokenizer("vq16", str(narrow_weights))
    loaded.setup("cpu", precision="float32")
    return loaded


@pytest.fixture(scope="session")
def s3() -> Iterator[Mapping[str, str]]:
    """The environment in which a server on loopback is the object store."""
    with s3_server.s3_server() as environment:
        yield environment


@pytest.fixture(scope="session")
def gs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment in which a server on loopback is Google's."""
    with gcs_server.gcs_server(tmp_path_factory.mktemp("gs")) as environment:
        yield environment


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> str:
    """The URI of a new, empty bucket; this process and those it starts reach it."""
    return request_bucket(request, request.param)


def request_bucket(request: pytest.FixtureRequest, scheme: str) -> str:
    """The URI of a new bucket at the server for this scheme."""
    patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name, value in request.getfixturevalue(scheme).items():
        patch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    (s3_server if scheme == "s3" else gcs_server).create_bucket(name)
    return f"{scheme}://{name}"


@pytest.fixture(params=["disk", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a database: a folder that is not there yet, or a prefix in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "place")
    return f"{request_bucket(request, request.param)}/some/prefix"
