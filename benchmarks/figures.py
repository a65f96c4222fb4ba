"""What every benchmark prints: the machine first, then its verdict and one JSON line.

In: what a script measured. Out: text on stdout and the exit code, 1 when a bound was missed or the
input is not usable.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Lance announces every table that it creates.
os.environ.setdefault("LANCE_LOG", "error")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine(threads: int | None = None) -> dict[str, Any]:
    """Print and return what the figures were measured on; a load beside them spoils them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
    here = {"cpu": model, "cores": cores(), "torch_threads": threads, "load": os.getloadavg()[0]}
    told = f", {threads} torch threads" if threads else ""
    print(
        f"machine: {model}, {here['cores']} cores{told}, load {here['load']:.1f} before the start,"
        f" Python {platform.python_version()}",
        flush=True,
    )
    return here


def finish(figure: str, found: dict[str, Any], misses: list[str]) -> None:
    """Print the verdict and the JSON line, and end the process."""
    for miss in misses:
        print(f"MISSED: {miss}")
    if not misses:
        print("every bound reached")
    print(json.dumps({"figure": figure, "ok": not misses, "missed": misses} | found))
    sys.exit(1 if misses else 0)
