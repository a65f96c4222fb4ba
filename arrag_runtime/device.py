"""The device that work runs on: which one, whether it is there, and whether its memory suffices.

torch is loaded where a question needs it, so the free memory of a machine is known without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.manifest import PRECISIONS

if TYPE_CHECKING:
    from torch import dtype

_MEMINFO = Path("/proc/meminfo")


def default_device() -> str:
    """A GPU where torch sees one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(device: str, instead: str) -> None:
    """Raise BadInputError for a GPU where torch sees none. `instead`: the option for a CPU."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise BadInputError(
            f"device '{device}' is not available (torch {torch.__version__} sees no GPU);"
            f" use {instead}, or install a CUDA build of torch"
        )


def require_precision(device: str, asked: str | None) -> str:
    """The precision asked for, else the device's own: float32 on a CPU, bfloat16 on a GPU.

    Raises BadInputError for an unknown one.
    """
    precision = asked or ("float32" if device == "cpu" else "bfloat16")
    if precision not in PRECISIONS:
        raise BadInputError(
            f"unknown precision '{precision}'; choose one of {', '.join(PRECISIONS)}"
        )
    return precision


def torch_dtype(precision: str) -> "dtype":
    """The torch dtype of a precision's name."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def available_memory(device: str) -> int | None:
    """The bytes that are free on a device; None where nobody says."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def require_memory(needed: int, device: str, what: str) -> None:
    """Raise BadInputError when `what`, of this many bytes, does not fit the device's free memory.

    On a CPU the system would end the process without a word instead.
    """
    free = available_memory(device)
    if free is not None and needed > free:
        raise BadInputError(
            f"{what} takes {needed / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free;"
            " use a smaller model, --precision bfloat16, or another --device"
        )


@contextmanager
def out_of_memory(doing: str) -> Iterator[None]:
    """Turn running out of memory into one line. `doing`: what for."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not ran_out and "not enough memory" not in str(error):  # how torch says it on a CPU
            raise
        raise BadInputError(
            f"too little memory for {doing}; use fewer pictures at once (--batch-size), a smaller"
            " model, or --precision bfloat16"
        ) from error
