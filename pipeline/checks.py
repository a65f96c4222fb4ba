"""What a verification answers with: one check after the other, each with what was seen."""

from dataclasses import dataclass
from typing import Any

SHOWN = 3
"""How many offenders a failed check names."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked. `detail` says what was seen, and for a failure where."""

    name: str
    ok: bool
    detail: str


def named(detail: str, offenders: Any) -> str:
    """The detail and, for a failure, the first offenders."""
    listed = sorted(map(str, offenders))
    if not listed:
        return detail
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{detail}; wrong: {', '.join(listed[:SHOWN])}{more}"
