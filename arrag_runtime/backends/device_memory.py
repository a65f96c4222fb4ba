"""Whether a model fits the memory, asked before it is loaded, and said in one line if it did not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from arrag_runtime.format.errors import BadInputError

MEMINFO = Path("/proc/meminfo")


def available_memory(device: str) -> int | None:
    """The bytes that are free on a device; None where nobody says."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
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
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise BadInputError(
            f"too little memory for {doing}; use fewer pictures at once (--batch-size), a smaller"
            " model, or --precision bfloat16"
        ) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error):  # how torch says it on a CPU
            raise
        raise BadInputError(
            f"too little memory for {doing}; use fewer pictures at once (--batch-size), a smaller"
            " model, or --precision bfloat16"
        ) from error
