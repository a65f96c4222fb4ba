"""What `arrag-db plan` forecasts, and what `arrag-db doctor` holds a machine against."""

from dataclasses import dataclass
from typing import Annotated, Literal

from arrag_runtime.settings import DATABASE, Database, Group, Option, check
from schemas.settings.index import QUERY_MS
from schemas.settings.source import SourceSettings

_COUNTED = Group(
    panel="Source", only=("name", "input", "where", "columns", "scale", "revision", "limit")
)


@dataclass(frozen=True, kw_only=True)
class ForecastSettings:
    """What would be built, and how fast."""

    database: Database = DATABASE
    """Folder or s3://BUCKET/PREFIX of the database; there need be none yet."""
    source: Annotated[SourceSettings, _COUNTED]
    rate: Annotated[float, Option(panel="Rates", minimum=0.001)] = 300.0
    """Addresses fetched per second."""
    images_per_second: Annotated[
        float | None, Option(panel="Rates", minimum=0.001, shown="as the database measured")
    ] = None
    """Pictures encoded per second, on all GPUs together."""
    success: Annotated[
        float | None,
        Option(panel="Rates", minimum=0.0, maximum=1.0, shown="0.9 for sources of links, else 1"),
    ] = None
    """Share of addresses that become pictures."""
    neighborhood: Annotated[str, Option(panel="Tokens and keys")] = "causal-1"
    """causal-1, causal-2 or surround-1."""
    border: Annotated[Literal["skip", "zero"], Option(panel="Tokens and keys")] = "skip"
    """skip positions at the border, or zero what is missing."""
    hold_out: Annotated[float, Option(minimum=0.0, maximum=0.99)] = 0.0
    """Share of pictures kept out of the patches."""
    query_ms: Annotated[float, Option(minimum=0.01)] = QUERY_MS
    """codebook: milliseconds a query may scan on one core."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """The work that the machine is meant for."""

    database: Database = DATABASE
    """Folder or s3://BUCKET/PREFIX of the database, whose disk is looked at."""
    source: Annotated[SourceSettings | None, _COUNTED] = None
    gpus: Annotated[int, Option(panel="Machine", minimum=0)] = 0
    """GPUs the build is to use."""
    ray: Annotated[str | None, Option(panel="Machine", shown="none; this machine")] = None
    """Address of the Ray cluster."""

    def __post_init__(self) -> None:
        check(self)
