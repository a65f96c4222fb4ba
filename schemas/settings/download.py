"""How links are fetched."""

from dataclasses import dataclass
from typing import Annotated

from arrag_runtime.settings import Option, check


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """How links are fetched, and what may be."""

    threads: Annotated[int, Option(flags="--download-threads", minimum=1)] = 64
    """URLs that a task fetches at a time."""
    timeout: Annotated[float, Option(minimum=0.1)] = 10.0
    """Seconds per URL, all in all."""
    max_bytes: Annotated[int, Option(minimum=1)] = 64 << 20
    """Reject larger files."""
    max_shard_bytes: Annotated[int, Option(minimum=1)] = 16 << 30
    """What a shard's files may take of $TMPDIR, where they lie until they are encoded."""
    shard_deadline: Annotated[float, Option(minimum=0.1)] = 3600.0
    """Give up a shard's download after so many seconds."""
    allow_private_hosts: Annotated[bool, Option()] = False
    """Fetch from intranets too."""
    contact: Annotated[str | None, Option(flags="--user-agent-contact")] = None
    """URL or mail address that servers are told."""
    keep_images: Annotated[str | None, Option()] = None
    """Keep fetched files in this folder, a tar per shard."""

    def __post_init__(self) -> None:
        check(self)
