"""What `arrag-db query` is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from arrag_runtime.settings import DATABASE, Databases, Option, check


@dataclass(frozen=True, kw_only=True)
class QuerySettings:
    """What to ask: an `image`, at one position or at all of them, or a key of `tokens`."""

    databases: Databases = (DATABASE,)
    """A database; several are searched as one."""
    image: Annotated[Path | None, Option()] = None
    """Ask with a picture's positions."""
    row: Annotated[int | None, Option(shown="all")] = None
    """Only this row of the grid (with --col)."""
    col: Annotated[int | None, Option(shown="all")] = None
    """Only this column (with --row)."""
    tokens: Annotated[tuple[int, ...] | None, Option(each="token", example="12,7,4095,3")] = None
    """Ask with a key: its tokens, separated by commas."""
    k: Annotated[int, Option(flags="-k", minimum=1)] = 10
    """Neighbours per position."""
    index: Annotated[str | None, Option(shown="the newest")] = None
    """Name of the index."""
    exclude_self: Annotated[bool, Option()] = False
    """Leave out what comes from the image itself and its copies, known by the hash of their bytes."""
    where: Annotated[str | None, Option()] = None
    """Search in these pictures only, such as "source = 'cc12m'"."""
    tokenizer_weights: Annotated[str | None, Option(shown="where the build found them")] = None
    """Where the database's tokenizer weights are, if they moved."""

    def __post_init__(self) -> None:
        check(self)
