"""How to reach the inputs of a source, and which of them to take."""

from dataclasses import dataclass

from schemas.records import GridShape


@dataclass(frozen=True)
class SourceSettings:
    """How to reach a source's inputs, and which of them to take.

    input: empty where a source needs none. where: an expression over the source's columns; rows it
    is not true for are no inputs. limit: the first so many of those, in the order of the source or,
    with `shuffle_seed`, in a shuffled one. columns: a preset's name or "image=…,caption=…".
    caption: which of JourneyDB's two. scale, revision: of DataComp's and other hub data sets.
    cache: where files fetched from a publisher are kept. grid: for token grids, set by the build.
    """

    name: str
    input: tuple[str, ...] = ()
    limit: int | None = None
    shard_size: int | None = None
    where: str | None = None
    shuffle_seed: int | None = None
    columns: str | None = None
    caption: str | None = None
    scale: str | None = None
    revision: str | None = None
    keep_faces: bool = False
    cache: str | None = None
    grid: GridShape | None = None
