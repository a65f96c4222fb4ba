"""How long work tells what it is doing."""

from typing import Protocol


class Progress(Protocol):
    """Called after every change with what is being done, how much of it is done, and of how much."""

    def __call__(self, step: str, done: int, total: int, /) -> None: ...


def silent(_step: str, _done: int, _total: int, /) -> None:
    """Tell nobody."""
