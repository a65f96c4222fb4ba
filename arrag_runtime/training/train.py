"""Train a FAiD adapter: the paper's recipe on one process or several (`accelerate launch`).

In: a generator and a training set. Out: `adapter.safetensors` in the run's folder, checkpoints to
go on from, `metrics.jsonl` (a line per step) and TensorBoard files. A step's examples, the order of
their candidates and its dropout follow from the seed and the step alone, so a run that was
interrupted goes on as if nothing had happened.

Source: AR-RAG (arXiv 2506.06962), section 4 and appendix; `TrainSettings` holds its constants.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arrag_runtime.backends.compatibility import require_same_grids
from arrag_runtime.backends.janus import load_janus
from arrag_runtime.device import require_device, torch_dtype
from arrag_runtime.faid.adapter import spec_of_model
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.training_set import Examples, TrainingSet
from arrag_runtime.training.model import NOT_INSTALLED, TrainingModel
from arrag_runtime.training.run import Metrics, TrainingRun
from arrag_runtime.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainReport:
    """What a training run came to."""

    adapter: Path
    """The file of the adapter."""
    steps: int
    """Steps in all."""
    resumed_at: int
    """The step that this run began with."""
    loss: float
    """Of the last step, in nats per token."""
    main: bool
    """Whether this is the process that speaks for all."""

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        fields = {"adapter": str(self.adapter), "steps": self.steps, "loss": self.loss}
        return fields | {"resumed_at": self.resumed_at}

    def to_text(self) -> str:
        """One line for people."""
        since = f", from step {self.resumed_at} on" if self.resumed_at else ""
        return f"adapter {self.adapter}: {self.steps} steps{since}, last loss {self.loss:.4f}"


_Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the loss."""


def train(
    settings: TrainSettings, progress: _Progress = lambda _done, _total, _loss: None
) -> TrainReport:
    """Train an adapter, or go on where the run in `out` was interrupted.

    Raises ArragError for what the user can mend: a set that does not fit the generator, a run of
    other settings in `out`, a loss that is no number.
    """
    before = torch.get_float32_matmul_precision()
    if settings.precision == "bfloat16" and settings.device != "cpu":
        # Blenders are folded in float32, which then may take a GPU's tensor cores too.
        torch.set_float32_matmul_precision("high")
    try:
        return _train(settings, progress)
    finally:
        torch.set_float32_matmul_precision(before)


def _train(settings: TrainSettings, progress: _Progress) -> TrainReport:
    data = TrainingSet.open(settings.data)
    if data.manifest.k < settings.k:
        raise BadInputError(
            f"training set {settings.data} has {data.manifest.k} retrieved tokens a position, and"
            f" --k is {settings.k}; make one with `arrag-db trainset --k {settings.k}`"
        )
    accelerator = _accelerator(settings)
    world, rank = int(accelerator.num_processes), int(accelerator.process_index)
    if settings.global_batch % (settings.batch_size * world):
        raise BadInputError(
            f"--global-batch {settings.global_batch} is no multiple of --batch-size"
            f" {settings.batch_size} times {world} processes; change one of them"
        )
    steps = settings.steps or math.ceil(settings.epochs * len(data) / settings.global_batch)
    described = {"images": len(data), "set": data.manifest.to_json(), "steps": steps}
    run = TrainingRun(settings.out.expanduser(), settings.recipe() | described)
    torch.manual_seed(settings.seed)
    model = make_training_model(settings, data, str(accelerator.device))
    parameters = list(model.trained().values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    start, loss = run.resume(model, optimizer)
    wrapped = accelerator.prepare_model(model)
    metrics = Metrics(run.folder, start) if accelerator.is_main_process else None
    for step in range(start, steps):
        began = time.perf_counter()
        rate = learning_rate(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Dropout follows from seed, step and process, so that going on needs no generator's state.
        mixed = np.random.SeedSequence((settings.seed, step, rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]) >> 1)
        total = torch.zeros((), device=accelerator.device)
        # This process's places in the stream of examples, in batches.
        first, batch = step * settings.global_batch, settings.batch_size
        mine = range(first + rank, first + settings.global_batch, world)
        parts = [list(mine[at : at + batch]) for at in range(0, len(mine), batch)]
        for number, part in enumerate(parts):
            examples = step_examples(data, settings, part)
            # Gradients are exchanged between processes with a step's last batch only.
            last = number == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(wrapped):
                part_loss = wrapped(*model.inputs(examples)).mean()
                accelerator.backward(part_loss / len(parts))
            total += part_loss.detach() / len(parts)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
        loss = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ArragError(
                f"the loss of step {step + 1} is {loss}, its gradient's norm {norm}; lower"
                " --learning-rate, or use --precision float32"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if metrics is not None:
            seconds = time.perf_counter() - began
            metrics.write(step + 1, loss, rate, norm, settings.global_batch, seconds)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
                run.save(step + 1, model, optimizer, loss)
        progress(step + 1, steps, loss)
    path = run.folder / "adapter.safetensors"
    if metrics is not None:
        metrics.close()
        run.finish(path, model, settings.model, torch_dtype(settings.precision))
    accelerator.wait_for_everyone()
    return TrainReport(path, steps, start, loss, metrics is not None)


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The learning rate of a step (from 0): a linear rise over the warm-up, then constant."""
    rising = math.ceil(settings.warmup * steps)
    return settings.learning_rate * min(1.0, (step + 1) / max(1, rising))


def step_examples(data: TrainingSet, settings: TrainSettings, numbers: list[int]) -> Examples:
    """The examples at these places of the endless stream of shuffled epochs.

    Of each position the first k retrieved tokens, shuffled; both orders follow from seed and place.
    """
    size = len(data)
    epochs = {place // size for place in numbers}
    orders = {e: np.random.default_rng([settings.seed, e]).permutation(size) for e in epochs}
    examples = data.rows([int(orders[place // size][place % size]) for place in numbers])
    shuffled = [
        np.random.default_rng([settings.seed, 1, place]).permuted(nearest, axis=1)
        for place, nearest in zip(numbers, examples.neighbors[:, :, : settings.k], strict=True)
    ]
    return Examples(examples.captions, examples.tokens, np.stack(shuffled))


def make_training_model(settings: TrainSettings, data: TrainingSet, device: str) -> TrainingModel:
    """The generator with fresh trainable parts. Raises IncompatibleError unless the set fits it."""
    backend = load_janus(settings.model, device, settings.precision)
    what, around = f"training set {settings.data}", data.manifest.keys.neighborhood
    require_same_grids(what, data.manifest.tokenizer, data.codebook, around, backend)
    rank, alpha = settings.lora_rank, settings.lora_alpha if settings.lora_rank else 0
    spec = replace(spec_of_model(backend.model), hops=settings.hops, blenders=settings.blenders)
    spec = replace(spec, lora_rank=rank, lora_alpha=alpha)
    dropout, longest = settings.lora_dropout, settings.caption_tokens
    model = TrainingModel(backend, spec, k=settings.k, dropout=dropout, longest=longest)
    return model.train()


def _accelerator(settings: TrainSettings) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ArragError(NOT_INSTALLED) from error
    require_device(settings.device, "--device cpu")
    # The training model chooses the precision of its forward pass itself.
    return Accelerator(cpu=settings.device == "cpu", mixed_precision="no")
