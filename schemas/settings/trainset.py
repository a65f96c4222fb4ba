"""What `arrag-db trainset` collects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from arrag_runtime.settings import DATABASE, Database, Group, Option, check
from schemas.settings.resources import RayResources
from schemas.settings.source import SourceSettings


@dataclass(frozen=True, kw_only=True)
class TrainsetSettings:
    """Which pictures a training set is made of, and what is retrieved for them."""

    database: Database = DATABASE
    """Folder or s3://BUCKET/PREFIX of the database."""
    k: Annotated[int, Option(flags="-k --k", minimum=1)] = 10
    """Retrieved tokens per position."""
    limit: Annotated[int | None, Option(minimum=1)] = 50_000
    """Pictures at most; of another source, its inputs at most."""
    pictures: Annotated[
        Literal["heldout", "database"] | None,
        Option(flags="--from", shown="heldout where there are any"),
    ] = None
    """heldout or database."""
    source: Annotated[
        SourceSettings | None, Group(panel="Pictures of another source", only=("name", "input"))
    ] = None
    out: Annotated[str | Path | None, Option(shown="DB/trainset")] = None
    """Folder or bucket of the set."""
    index: Annotated[str | None, Option(shown="the newest")] = None
    """Name of the index."""
    tokenizer_weights: Annotated[str | None, Option(shown="where the build found them")] = None
    """Where the database's tokenizer weights are, if they moved."""
    resources: Annotated[
        RayResources, Group(panel="Machine", only=("address", "workers", "threads", "gpus"))
    ] = field(default_factory=RayResources)

    def __post_init__(self) -> None:
        check(self)
