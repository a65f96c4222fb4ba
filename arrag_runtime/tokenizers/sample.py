"""The bundled tokenizer: VQ-16's classes, narrow, with weights of 8 MB at most.

It exists so that everything runs offline right after installation. It was trained by
`benchmarks/train_sample_tokenizer.py`; `weights/MODEL_CARD.md` says on what and how good it is.
Other shipped parts build on its tokens, so its weights are frozen.
"""

from pathlib import Path

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.tokenizers.vq16 import VQTokenizer, load_vq

SAMPLE_TOKENIZER = Path(__file__).parent / "weights" / "sample.safetensors"


def load_sample(weights: str | None) -> VQTokenizer:
    """The bundled tokenizer. Raises BadInputError when other weights are asked for."""
    if weights is not None:
        raise BadInputError(
            f"the sample tokenizer has its own weights, so '{weights}' cannot be used with it;"
            " pass --tokenizer vq16 with --tokenizer-weights"
        )
    return load_vq("sample", SAMPLE_TOKENIZER, None)
