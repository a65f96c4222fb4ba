"""A training run's folder: checkpoints to go on from, and what was measured.

`checkpoints/step-N/` holds an adapter, the optimiser's state and `state.json`; it is renamed into
place when complete. `metrics.jsonl` has a line per step, `tensorboard/` the same for TensorBoard;
what a run wrote beyond the checkpoint from which it goes on is written again.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from arrag_runtime.faid.adapter import read_adapter, write_adapter
from arrag_runtime.format.errors import ArragError, BadInputError, IncompatibleError
from arrag_runtime.format.manifest import read_json, write_json
from arrag_runtime.training.model import TrainingModel

_KEEP = 2
"""Checkpoints kept: the newest, and one more in case that one is lost."""


class TrainingRun:
    """A run in a folder. recipe: what its results follow from; a run of another one is refused."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        self._recipe: dict[str, Any] = json.loads(json.dumps(recipe))
        self._checkpoints = folder / "checkpoints"
        self._newest = max(self._steps(), default=None)
        self._state: dict[str, Any] = {"step": 0, "loss": math.nan}
        known = ("checkpoints", "tensorboard", "metrics.jsonl", "adapter.safetensors")
        strange = sorted(p.name for p in folder.glob("[!.]*") if p.name not in known)
        if strange and self._newest is None:
            raise BadInputError(
                f"--out {folder} is not empty (it holds {strange[0]}); name an empty or new folder"
            )
        if self._newest is not None:
            self._state = read_json(str(self._newest / "state.json"))
            self._require_same(self._state["recipe"])

    def resume(self, model: TrainingModel, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Load the newest checkpoint; returns the step to go on with and its loss, else 0, NaN."""
        if self._newest is not None:
            model.load(read_adapter(self._newest / "adapter.safetensors"), str(self._newest))
            path = self._newest / "optimizer.pt"
            optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return int(self._state["step"]), float(self._state["loss"])

    def save(
        self, step: int, model: TrainingModel, optimizer: torch.optim.Optimizer, loss: float
    ) -> None:
        """Write a checkpoint after this many steps, complete or not at all."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        draft = self._checkpoints / f".step-{step:06}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write_adapter(draft / "adapter.safetensors", model.adapter({"steps": str(step)}))
        torch.save(optimizer.state_dict(), draft / "optimizer.pt")
        write_json(str(draft / "state.json"), {"step": step, "loss": loss, "recipe": self._recipe})
        final = self._checkpoints / f"step-{step:06}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        for old in self._steps()[:-_KEEP]:
            shutil.rmtree(old)

    def finish(self, path: Path, model: TrainingModel, name: str, dtype: torch.dtype) -> None:
        """Write the trained adapter in the precision it was trained for."""
        about = {"trained on": name, "recipe": json.dumps(self._recipe, sort_keys=True)}
        write_adapter(path, model.adapter(about, dtype))

    def _steps(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        return sorted(p for p in self._checkpoints.glob("step-*") if (p / "state.json").exists())

    def _require_same(self, have: dict[str, Any]) -> None:
        for name in {*have, *self._recipe}:
            if have.get(name) != self._recipe.get(name):
                shown = "" if name == "set" else f" {have.get(name)}, not {self._recipe.get(name)}"
                raise IncompatibleError(
                    f"--out {self.folder} holds a run with another {name.replace('_', ' ')}{shown};"
                    " name another --out, or delete this one"
                )


class Metrics:
    """Loss, learning rate and gradient norm of each step, for people and for TensorBoard."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArragError(
                "training writes TensorBoard files, and tensorboard is not installed; `pip install"
                " 'arrag[train]'`"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = path.read_text().splitlines()[:start] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in kept))
        self._lines = path.open("a")
        writer: Any = SummaryWriter
        self._board = writer(str(folder / "tensorboard"), purge_step=start + 1)

    def write(
        self, step: int, loss: float, rate: float, norm: float, examples: int, seconds: float
    ) -> None:
        """What was measured in step number `step` (from 1). loss: nats per token."""
        values = {"loss": loss, "learning_rate": rate, "gradient_norm": norm}
        line = {"step": step, **values, "examples": examples, "seconds": seconds}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write everything out."""
        self._lines.close()
        self._board.close()
