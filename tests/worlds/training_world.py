"""A narrow generator on disk, and a training set for it in one Arrow file."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa

from arrag_runtime.format.list_columns import fixed_lists
from arrag_runtime.format.neighborhood import MISSING
from arrag_runtime.format.specs import key_spec
from arrag_runtime.format.training_set import (
    TRAINSET_CODEBOOK,
    TRAINSET_MANIFEST,
    TrainsetManifest,
    trainset_schema,
)
from arrag_runtime.training.settings import TrainSettings
from tests.worlds.narrow_janus import narrow_janus, save_checkpoint, text_tokenizer
from tests.worlds.patch_world import CODES, SPEC

K, EXAMPLES = 3, 11
CELLS = SPEC.positions


def write_model(folder: Path) -> Path:
    """The narrow generator in transformers' layout."""
    words = text_tokenizer()
    return save_checkpoint(folder, narrow_janus(words), words)


def write_set(path: Path, *, examples: int = EXAMPLES, border: str = "skip", seed: int = 0) -> Path:
    """Captions, grids and neighbours, in which the first candidate is often the true token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 24, (examples, CELLS)).astype(np.uint16)
    near = rng.integers(0, 24, (examples, 7, 7, K)).astype(np.uint16)
    near[..., 0] = tokens.reshape(examples, 7, 7)
    near[:, 0] = near[:, :, 0] = near[:, :, -1] = MISSING
    near[1, 3, 3, 1:] = MISSING
    keys = key_spec("causal-1", border, "codebook")
    manifest = TrainsetManifest(SPEC, keys, K, "flat", 1, "heldout", examples)
    stream = io.BytesIO()
    np.save(stream, CODES)
    metadata = {TRAINSET_MANIFEST: manifest.to_json(), TRAINSET_CODEBOOK: stream.getvalue()}
    schema = trainset_schema(manifest).with_metadata(metadata)
    columns = [
        pa.array(rng.permutation(examples)),
        pa.array([f"{n:064x}" for n in range(examples)]),
        pa.array([f"a photo of {'a hat ' * (n % 4)}number {n}" for n in range(examples)]),
        fixed_lists(tokens),
        fixed_lists(near.reshape(examples, -1)),
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))
    return path


def quick(model: Path, data: Path, out: Path, **changes: object) -> TrainSettings:
    """The paper's recipe at the size of the narrow generator, on a CPU in float32."""
    fields: dict[str, object] = {
        "model": str(model),
        "data": data,
        "out": out,
        "k": K,
        "lora_rank": 4,
        "lora_alpha": 8,
        "global_batch": 4,
        "batch_size": 2,
        "steps": 6,
        "precision": "float32",
        "checkpoint_every": 2,
        "learning_rate": 2e-3,
    }
    return TrainSettings(**fields | changes)  # type: ignore[arg-type]
