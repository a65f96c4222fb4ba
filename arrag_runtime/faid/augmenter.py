"""How a decode loop hands retrieved tokens to something that changes the model's forward passes.

In: before each forward pass, the position that it predicts and what was retrieved for it. Out:
nothing; an `Augmenter` works through hooks on the model's layers. DAiD needs none of this, since it
changes probabilities after the forward pass; FAiD does (AR-RAG, section 3.3).
"""

from dataclasses import dataclass
from typing import Any, Protocol

from arrag_runtime.search.neighbors import Neighbors


@dataclass(frozen=True)
class Batch:
    """The pictures that are decoded together."""

    images: int
    """Their number B."""
    guided: bool
    """With guidance every forward pass has 2 B rows, rows 0..B-1 with the prompts and rows
    B..2 B-1 the same pictures without; else it has B rows."""
    height: int
    """Rows of the token grid."""
    width: int
    """Columns of the token grid."""
    device: Any
    """The torch.device of the model."""

    @property
    def rows(self) -> int:
        """The rows of a forward pass."""
        return self.images * (2 if self.guided else 1)


@dataclass(frozen=True)
class Step:
    """One forward pass: the one whose last sequence position predicts (row, col).

    The forward pass of position t feeds token t - 1, that of position 0 the prompts.
    """

    position: int
    """row · width + col."""
    row: int
    col: int
    """Row and column of the position in the token grid."""
    tokens: Any
    """The tokens chosen so far, long [B, position], on the model's device."""
    neighbors: Neighbors | None
    """[B, K], nearest first, only the first `count` of a row being real; None where the position
    has no full neighbourhood."""


class Augmenter(Protocol):
    """What changes forward passes while pictures are decoded, as the loop sees it.

    The loop calls `begin` once per batch, `before_forward` before each forward pass, and `end` in
    any case, also after an error: nothing of a batch may be left on the model then.
    """

    k: int
    """How many neighbours it wants; the loop retrieves at least so many."""

    def begin(self, batch: Batch) -> None:
        """A batch of pictures starts."""

    def before_forward(self, step: Step) -> None:
        """The forward pass that predicts `step.position` comes next."""

    def end(self) -> None:
        """The batch is over."""
