"""`arrag-db doctor`: is this machine fit for the work, said before hours are spent on it.

Out: one `Finding` a thing looked at, each with the next step where it is not as it should be. Facts
about the machine are gathered in one place and judged by pure functions.
"""

import contextlib
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from arrag_runtime.device import available_memory
from arrag_runtime.format.location import in_store
from pipeline.plan import Forecast, forecast, size
from schemas.settings.plan import DoctorSettings, ForecastSettings
from stages.sources import source_kind

Verdict = Literal["ok", "warn", "FAIL"]
_OPEN_FILES_WANTED = 4096
_SHM_WANTED = 2 << 30
"""Ray keeps pictures on their way in shared memory; below this it writes them to disk instead."""
_SPARE = 1.2
"""Tables are compacted and indexes are built beside old ones, so a little room must be left."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `step` is what to do about it, empty where it is as it should be."""

    name: str
    verdict: Verdict
    detail: str
    step: str = ""


@dataclass(frozen=True)
class Machine:
    """What the findings are made from. Sizes are in bytes; None where something is not there."""

    python: str
    packages: dict[str, str]
    cuda_build: str | None
    gpus: tuple[str, ...]
    nvidia: bool
    hub_token: bool
    free_disk: int | None
    memory: int | None
    open_files: int
    shared_memory: int | None
    ray_auth: str
    ray_token: bool


def doctor(settings: DoctorSettings) -> list[Finding]:
    """Look at this machine, and judge it for a source's plan or for work in general.

    for finding in doctor(DoctorSettings(database="mydb", gpus=1)):
        print(finding.verdict, finding.name, finding.detail)
    """
    plan = None
    if settings.source is not None:
        plan = forecast(ForecastSettings(source=settings.source, database=settings.database))
    return diagnose(examine(settings.database), plan, gpus=settings.gpus, address=settings.ray)


def examine(database: str | Path) -> Machine:
    """Look at this machine; `database` says whose disk is meant."""
    from huggingface_hub import get_token

    shm = Path("/dev/shm")
    cuda, gpus = _torch()
    place = Path(database).expanduser().absolute()
    disk = next(folder for folder in (place, *place.parents) if folder.exists())
    ray_token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return Machine(
        python=".".join(map(str, sys.version_info[:3])),
        packages=_packages(),
        cuda_build=cuda,
        gpus=gpus,
        nvidia=Path("/proc/driver/nvidia/version").exists(),
        # Whether there is a token; it is neither read out nor sent anywhere.
        hub_token=get_token() is not None,
        free_disk=None if in_store(str(database)) else shutil.disk_usage(disk).free,
        memory=available_memory("cpu"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        shared_memory=shutil.disk_usage(shm).total if shm.exists() else None,
        ray_auth=os.environ.get("RAY_AUTH_MODE", ""),
        ray_token=bool(os.environ.get("RAY_AUTH_TOKEN")) or ray_token.exists(),
    )


def diagnose(
    machine: Machine, plan: Forecast | None = None, *, gpus: int = 0, address: str | None = None
) -> list[Finding]:
    """Judge a machine for a plan, or for work in general. Pure.

    gpus: how many the build is to use; address: of the Ray cluster it is to run on.
    """
    return [
        _faiss(machine),
        _bounds(machine, plan),
        _gpu(machine, gpus, address),
        _token(machine, plan),
        _disk(machine, plan),
        _memory(machine, plan),
        _files(machine),
        _shared(machine),
        _ray(machine, address),
    ]


def _judged(name: str, detail: str, wrong: bool, verdict: Verdict, step: str) -> Finding:
    """All is well, or this verdict and step where something is wrong."""
    return Finding(name, verdict, detail, step) if wrong else Finding(name, "ok", detail)


def _faiss(machine: Machine) -> Finding:
    cpu, gpu = (machine.packages.get(name) for name in ("faiss-cpu", "faiss-gpu"))
    if cpu and gpu:
        step = (
            "keep one: `pip uninstall -y faiss-cpu faiss-gpu`, then"
            f" `pip install --no-deps {'faiss-gpu' if machine.gpus else 'faiss-cpu'}`"
        )
        return Finding("faiss", "FAIL", f"faiss-cpu {cpu} and faiss-gpu {gpu} clash", step)
    if not cpu and not gpu:
        return Finding("faiss", "FAIL", "not installed", "`pip install faiss-cpu`")
    if cpu and machine.gpus:
        step = "`pip uninstall -y faiss-cpu`, then `pip install --no-deps faiss-gpu`"
        return Finding("faiss", "warn", f"faiss-cpu {cpu} beside a GPU: training is slow", step)
    return Finding("faiss", "ok", f"faiss-cpu {cpu}" if cpu else f"faiss-gpu {gpu}")


def _bounds(machine: Machine, plan: Forecast | None) -> Finding:
    """Pairs that fail at import although they can be installed, and what the plan's index lacks."""
    numpy, arrow = (machine.packages.get(name, "0") for name in ("numpy", "pyarrow"))
    detail = f"Python {machine.python}, numpy {numpy}, pyarrow {arrow}"
    old_numpy = int(numpy.split(".")[0]) < 2
    if "autofaiss" in machine.packages and not old_numpy:
        detail += ": autofaiss needs numpy below 2"
        step = "`pip install 'arrag[ivfpq]'` brings what goes together"
        return Finding("packages", "FAIL", detail, step)
    if int(arrow.split(".")[0]) >= 26 and old_numpy:
        detail += ": pyarrow 26 needs numpy 2"
        return Finding("packages", "FAIL", detail, "`pip install 'pyarrow<26'`")
    if plan is not None and plan.index["kind"] == "ivfpq" and "autofaiss" not in machine.packages:
        step = "`pip install 'arrag[ivfpq]'`, in an environment of its own, before the index"
        return Finding("packages", "warn", f"{detail}: no autofaiss to train ivfpq with", step)
    return Finding("packages", "ok", detail)


def _gpu(machine: Machine, gpus: int, address: str | None) -> Finding:
    torch = f"torch {machine.packages.get('torch', 'missing')}"
    cpu_build = machine.nvidia and machine.cuda_build is None
    if len(machine.gpus) < gpus:
        detail = f"--gpus {gpus}, but {torch} sees {len(machine.gpus)}"
        if address is not None:
            step = "only this machine was looked at; run `arrag-db doctor` on a node that encodes"
            return Finding("GPU", "warn", f"{detail} here", step)
        if cpu_build:
            return Finding("GPU", "FAIL", f"{detail}: a CPU build", "install a CUDA build of torch")
        step = f"pass --gpus {len(machine.gpus)}, or use another machine"
        return Finding("GPU", "FAIL", detail, step)
    if cpu_build:
        step = "install a CUDA build of torch"
        return Finding("GPU", "warn", f"a driver is here, but {torch} is a CPU build", step)
    if not machine.gpus:
        step = "a CPU encodes a few pictures a second at best: use --source tokens, or a GPU"
        return Finding("GPU", "warn", f"none; {torch}", step)
    return Finding("GPU", "ok", f"{', '.join(machine.gpus)}; {torch}, CUDA {machine.cuda_build}")


def _token(machine: Machine, plan: Forecast | None) -> Finding:
    if machine.hub_token:
        return Finding("hub token", "ok", "there is one")
    gated = plan is not None and source_kind(plan.source).gated
    step = "`hf auth login` with an account that was granted access"
    detail = "none" + ("; this data set is gated" if gated else "; gated data sets stay closed")
    return Finding("hub token", "FAIL" if gated else "warn", detail, step)


def _disk(machine: Machine, plan: Forecast | None) -> Finding:
    if machine.free_disk is None:
        return Finding("disk", "ok", "the database is in a bucket")
    free = f"{size(machine.free_disk)} free"
    if plan is None:
        step = "give a source to compare with a plan, or name a larger disk with --db"
        return _judged("disk", free, machine.free_disk < 10 << 30, "warn", step)
    needed = round((plan.disk_bytes + min(plan.index_memory.values())) * _SPARE)
    detail = f"{free}, the plan takes about {size(needed)} with an index"
    step = "name a larger disk with --db, or pass --limit"
    return _judged("disk", detail, machine.free_disk < needed, "FAIL", step)


def _memory(machine: Machine, plan: Forecast | None) -> Finding:
    if machine.memory is None:
        step = "see that 4 GB are free"
        return Finding("memory", "warn", "the system does not say what is available", step)
    free = f"{size(machine.memory)} available"
    if plan is None:
        step = "use fewer --workers: each holds the tokenizer and a shard"
        return _judged("memory", free, machine.memory < 4 << 30, "warn", step)
    kind, needed = min(plan.index_memory.items(), key=lambda entry: entry[1])
    detail = f"{free}, the smallest index ({kind}) takes {size(needed)}"
    step = "search on a machine with more memory, or index a part with --limit"
    return _judged("memory", detail, machine.memory < needed, "warn", step)


def _files(machine: Machine) -> Finding:
    low = machine.open_files < _OPEN_FILES_WANTED
    step = f"`ulimit -n {_OPEN_FILES_WANTED}` before the build"
    return _judged("file limit", f"{machine.open_files:,} may be open", low, "warn", step)


def _shared(machine: Machine) -> Finding:
    if machine.shared_memory is None:
        return Finding("/dev/shm", "warn", "not there", "Ray uses a folder on disk, which is slow")
    low = machine.shared_memory < _SHM_WANTED
    step = "enlarge it (`docker run --shm-size 8g …`), else Ray uses a slow folder on disk"
    return _judged("/dev/shm", size(machine.shared_memory), low, "warn", step)


def _ray(machine: Machine, address: str | None) -> Finding:
    if "ray" not in machine.packages:
        return Finding("Ray", "FAIL", "not installed", "`pip install 'arrag[build]'`")
    version = f"Ray {machine.packages['ray']}"
    if machine.ray_auth == "token" and not machine.ray_token:
        step = "`ray get-auth-token --generate`, the same token on the head and on every client"
        return Finding("Ray", "FAIL", f"{version}, RAY_AUTH_MODE=token without a token", step)
    detail = f"{version}, authentication {machine.ray_auth or 'its default'}"
    if address is not None and machine.ray_auth != "token":
        step = "set RAY_AUTH_MODE=token and the head's token, unless the cluster runs without"
        return Finding("Ray", "warn", f"{detail} for {address}", step)
    return Finding("Ray", "ok", detail)


def to_text(findings: Sequence[Finding]) -> str:
    """A line a finding, and below it the next step."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<4} {finding.name}: {finding.detail}")
        if finding.step and finding.verdict != "ok":
            lines.append(f"     → {finding.step}")
    return "\n".join(lines)


def _packages() -> dict[str, str]:
    names = ("faiss-cpu", "faiss-gpu", "numpy", "pyarrow", "torch", "ray", "autofaiss", "pylance")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _torch() -> tuple[str | None, tuple[str, ...]]:
    """The CUDA version torch was built for, and the GPUs it sees."""
    try:
        import torch
    except ImportError:
        return None, ()
    cuda = torch.version.cuda
    count = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
    return cuda, tuple(torch.cuda.get_device_name(index) for index in range(count))
