"""What a run may use of a machine or a cluster."""

from dataclasses import dataclass
from typing import Annotated

from arrag_runtime.settings import Option, check


@dataclass(frozen=True, kw_only=True)
class RayResources:
    """What the run may use of a machine or a cluster."""

    address: Annotated[
        str | None, Option(flags="--ray", env="RAY_ADDRESS", shown="one of its own, embedded")
    ] = None
    """Address of a Ray cluster."""
    workers: Annotated[int, Option(minimum=0)] = 0
    """Encoders or tasks at once on CPUs; 0 takes one per --threads cores."""
    threads: Annotated[int, Option(minimum=1)] = 1
    """CPU threads of each."""
    gpus: Annotated[int, Option(minimum=0)] = 0
    """Encode on this many GPUs, with one encoder on each."""
    autoscale: Annotated[bool, Option()] = False
    """Nodes may join: --gpus and --workers are limits."""
    read_resource: Annotated[str | None, Option(shown="any node")] = None
    """Read and download on nodes that declare this to Ray."""
    encode_resource: Annotated[str | None, Option(shown="any node")] = None
    """Encode on nodes that declare this to Ray."""
    in_flight_bytes: int = 4 << 30
    """What shards on their way to encoders may take of the cluster's memory."""

    def __post_init__(self) -> None:
        check(self)
