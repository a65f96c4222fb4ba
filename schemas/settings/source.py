"""How to reach the inputs of a source, and which of them to take."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from arrag_runtime.settings import Option, check

if TYPE_CHECKING:
    from schemas.records import GridShape


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How to reach a source's inputs, and which of them to take."""

    name: Annotated[str, Option(flags="--source")]
    """sample, folder, webdataset, cc12m, datacomp, journeydb, parquet or tokens."""
    input: Annotated[
        tuple[str, ...], Option(flags="--input -i", shown="the publisher's, where there is one")
    ] = ()
    """Folder, file, pattern, hub data set; may be repeated."""
    limit: Annotated[int | None, Option(minimum=1, shown="all")] = None
    """Take only the first N inputs."""
    shard_size: Annotated[int | None, Option(minimum=1, shown="by source")] = None
    """Inputs per shard."""
    where: Annotated[str | None, Option()] = None
    """Take only rows for which this is true, e.g. 'clip_l14_similarity_score > 0.28'."""
    shuffle_seed: Annotated[int | None, Option(minimum=0, shown="the source's order")] = None
    """Take shards and rows in an order drawn from this."""
    columns: Annotated[str | None, Option(shown="by their names")] = None
    """For tables: datacomp, llava-recap-cc12m, midjourney-v6, cc12m, or
    'image=A,caption=B,url=C,key=D'."""
    caption: Annotated[Literal["task2", "prompt"] | None, Option(shown="task2")] = None
    """For journeydb: task2 or prompt."""
    scale: Annotated[
        Literal["small", "medium", "large", "xlarge"] | None, Option(shown="small")
    ] = None
    """For datacomp: small, medium, large or xlarge."""
    revision: Annotated[str | None, Option(shown="main's commit now")] = None
    """Of a data set on the hub."""
    keep_faces: Annotated[bool, Option()] = False
    """Do not blur faces that the source lists."""
    cache: Annotated[str | None, Option(env="ARRAG_CACHE", shown="~/.cache/arrag")] = None
    """Where fetched lists are kept."""
    grid: "GridShape | None" = None
    """The shape of token grids; the build sets it."""

    def __post_init__(self) -> None:
        check(self)
