"""What a run may use of a machine or a cluster."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RayResources:
    """What the run may use. `address` None starts an embedded cluster that ends with the run.

    workers: encode actors, each with `threads` CPU threads (0: one actor a GPU, else one a core);
    gpus: GPUs for them in all, one an actor. With `autoscale` these are upper bounds: what the
    cluster lacks now may join later, and the pool of encoders grows to it.
    read_resource, encode_resource: names of custom resources; reading and downloading, and
    encoding, run on nodes that declare them.
    """

    address: str | None = None
    workers: int = 0
    threads: int = 1
    gpus: int = 0
    autoscale: bool = False
    read_resource: str | None = None
    encode_resource: str | None = None
    in_flight_bytes: int = 4 << 30
