"""Which rejects are to be tried again: pure but for reading the table of rejects."""

from collections import defaultdict
from collections.abc import Sequence

import pyarrow.compute as pc

from schemas.errors import BadInputError
from schemas.manifest import Layout
from schemas.records import REASONS, Attempt
from stages.ledger import LedgerState
from stages.read_rejects import open_rejects


def require_reasons(reasons: Sequence[str]) -> None:
    """Raise BadInputError for a reason that no reject can have."""
    for reason in reasons:
        if reason not in REASONS:
            raise BadInputError(
                f"--retry-rejects '{reason}' is no reason of a reject; choose from"
                f" {', '.join(sorted(REASONS))}"
            )


def plan_retry(
    layout: Layout, state: LedgerState, source: str, reasons: Sequence[str]
) -> tuple[Attempt, ...]:
    """The next attempt of each shard of `source` that has open rejects with these reasons."""
    rejects = open_rejects(layout.rejects, state, ["reason"])
    rejects = rejects.filter(pc.is_in(rejects["reason"], pc.cast(list(reasons), "string")))
    rows: dict[str, list[int]] = defaultdict(list)
    for shard, row in zip(rejects["shard"].to_pylist(), rejects["row"].to_pylist(), strict=True):
        rows[shard].append(row)
    return tuple(
        Attempt(
            known.shard, state.attempts[known.shard.id] + 1, tuple(sorted(rows[known.shard.id]))
        )
        for known in state.recorded
        if known.shard.source == source and known.shard.id in rows
    )
