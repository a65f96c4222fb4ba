"""The recipe of FAiD's training.

Source: AR-RAG (arXiv 2506.06962), section 4 and appendix; the defaults are its constants.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from arrag_runtime.settings import Option, check


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train, on what, and how; the defaults are the paper's."""

    data: Annotated[Path, Option()]
    """A training set: `arrag-db trainset`'s folder or exported file."""
    out: Annotated[Path, Option(flags="--out -o")]
    """Folder of the run."""
    model: Annotated[str, Option()] = "sample"
    """sample, a folder, or a hub id such as deepseek-community/Janus-Pro-1B."""
    hops: Annotated[tuple[int, ...], Option(panel="Adapter", each="hop", example="1,2")] = (1, 2)
    """Hops of a blender, separated by commas."""
    blenders: Annotated[int, Option(panel="Adapter", minimum=1)] = 2
    """Augmented layers."""
    k: Annotated[int, Option(flags="-k --k", panel="Adapter", minimum=1)] = 10
    """Candidates per position."""
    lora_rank: Annotated[int, Option(panel="Adapter", minimum=0)] = 128
    """Rank of LoRA; 0 trains none."""
    lora_alpha: Annotated[int, Option(panel="Adapter")] = 256
    """LoRA's scale is this over its rank."""
    lora_dropout: Annotated[float, Option(panel="Adapter", minimum=0, below=1)] = 0.05
    """Dropout before LoRA."""
    learning_rate: Annotated[float, Option(panel="Recipe", above=0)] = 2e-4
    """After the warm-up."""
    warmup: Annotated[float, Option(panel="Recipe", minimum=0, maximum=1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    clip: Annotated[float, Option(panel="Recipe")] = 1.0
    """Largest norm of a step's gradients."""
    global_batch: Annotated[int, Option(panel="Recipe", minimum=1)] = 256
    """Examples per step, over all processes."""
    epochs: Annotated[float, Option(panel="Recipe", above=0)] = 1.0
    """How often each example is seen."""
    steps: Annotated[int | None, Option(panel="Recipe", minimum=1, shown="by --epochs")] = None
    """Steps, whatever --epochs says."""
    caption_tokens: Annotated[int, Option(panel="Recipe", minimum=1)] = 512
    """Tokens of a caption that are read."""
    seed: Annotated[int, Option(panel="Recipe", minimum=0)] = 0
    """Decides every order and start."""
    batch_size: Annotated[int, Option(panel="Machine", minimum=1)] = 4
    """Examples at once on one process."""
    precision: Annotated[Literal["bfloat16", "float32"], Option(panel="Machine")] = "bfloat16"
    """bfloat16 or float32, of the forward pass; trained weights are float32 in any case."""
    device: Annotated[Literal["cpu", "cuda"], Option(panel="Machine")] = "cpu"
    """cpu or cuda."""
    checkpoint_every: Annotated[int, Option(panel="Machine", minimum=1)] = 25
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check(self)

    def recipe(self) -> dict[str, Any]:
        """What a run's results follow from, as checkpoints hold it; the rest may change in between."""
        free = {"out", "data", "device", "batch_size", "checkpoint_every"}
        fields = {name: value for name, value in vars(self).items() if name not in free}
        return fields | {"hops": list(self.hops)}
