"""What `arrag-db evaluate` measures."""

from dataclasses import dataclass
from typing import Annotated

from arrag_runtime.settings import DATABASE, Database, Option, check


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Which indexes to evaluate, and by how many questions."""

    database: Database = DATABASE
    """Folder or s3://BUCKET/PREFIX of the database."""
    indexes: Annotated[tuple[str, ...], Option(flags="--index", shown="all")] = ()
    """Name of an index; may be repeated."""
    pictures: Annotated[int, Option(minimum=1)] = 200
    """Pictures to ask with."""
    queries: Annotated[int, Option(minimum=1)] = 2000
    """Positions to ask about."""
    k: Annotated[int, Option(flags="-k", minimum=1)] = 2048
    """Neighbours per position, as many as DAiD asks for."""
    seed: Annotated[int, Option()] = 0
    """Which pictures and positions are drawn."""
    ray: Annotated[str | None, Option(shown="none; this machine")] = None
    """Ray cluster for exact search over large tables."""

    def __post_init__(self) -> None:
        check(self)
