"""What becomes of the index that is in place, by a table of cases over all facts."""

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from pipeline.indexing.growth import FRESH, Decision, Facts, decide, next_part

TWO, EIGHT = tuple(f"part-{n:04}" for n in (0, 3)), tuple(f"part-{n:04}" for n in range(8))
CURRENT = Facts(
    parts=TWO,
    mark=7,
    rows_stand=True,
    compacted=False,
    new_rows=False,
    outgrown=False,
    lacks_wanted=False,
    holds_unwanted=False,
)
"""An index in two parts that is as its table."""
KEEP = Decision(TWO, None, 7, None)
GROW = Decision(TWO, "part-0004", 7, None)
GROW_AND_MERGE = Decision(TWO, "part-0004", 7, "part-0005")
REWRITE = Decision(TWO, None, 7, "part-0004")

CASES = {
    # rows_stand, compacted, new_rows, holds_unwanted
    (True, False, False, False): KEEP,
    (True, False, False, True): REWRITE,
    (True, False, True, False): GROW,
    (True, False, True, True): GROW_AND_MERGE,
    (True, True, False, False): KEEP,
    (True, True, False, True): REWRITE,
    (True, True, True, False): GROW,
    (True, True, True, True): GROW_AND_MERGE,
    (False, False, False, False): FRESH,
    (False, False, False, True): FRESH,
    (False, False, True, False): FRESH,
    (False, False, True, True): FRESH,
    # Rows that a compaction moved are in later fragments, and yet none of them is new.
    (False, True, False, False): REWRITE,
    (False, True, False, True): REWRITE,
    (False, True, True, False): REWRITE,
    (False, True, True, True): REWRITE,
}


@pytest.mark.parametrize("case", CASES)
def test_what_becomes_of_an_index(case: tuple[bool, bool, bool, bool]) -> None:
    rows_stand, compacted, new_rows, holds_unwanted = case
    facts = replace(
        CURRENT,
        rows_stand=rows_stand,
        compacted=compacted,
        new_rows=new_rows,
        holds_unwanted=holds_unwanted,
    )
    assert decide(facts) == CASES[case]
    assert decide(replace(facts, outgrown=True)) == FRESH
    assert decide(replace(facts, lacks_wanted=True)) == FRESH
    assert CASES[case].rewrites == (CASES[case] == REWRITE)


@pytest.mark.parametrize(
    ("new_rows", "expected"),
    [
        (False, Decision(EIGHT, None, 7, None)),
        (True, Decision(EIGHT, "part-0008", 7, "part-0009")),
    ],
)
def test_more_than_eight_parts_are_merged(new_rows: bool, expected: Decision) -> None:
    assert decide(replace(CURRENT, parts=EIGHT, new_rows=new_rows)) == expected


def test_no_decision_loses_or_doubles_anything() -> None:
    """Whatever the facts: all parts are kept or none, and no two of them have one name."""
    assert FRESH.parts == ("part-0000",)
    assert (FRESH.after, FRESH.merged) == (-1, None)
    flags = [field.name for field in fields(Facts) if field.name not in ("parts", "mark")]
    for values in product((False, True), repeat=len(flags)):
        chosen: dict[str, Any] = dict(zip(flags, values, strict=True))
        facts = replace(CURRENT, **chosen)
        made = decide(facts)
        assert made.kept in ((), TWO)
        names = [*made.parts, *filter(None, [made.merged])]
        assert len(names) == len(set(names)) > 0
        # What may hold unwanted pictures, or rows of which some are gone, never stays as it is.
        if made.kept and (facts.holds_unwanted or not facts.rows_stand):
            assert made.merged is not None
        # Rows that are filled in are later ones than those kept.
        if made.filled is not None:
            assert made.after == (facts.mark if made.kept else -1)


def test_the_next_part_has_a_name_of_its_own() -> None:
    assert next_part(()) == "part-0000"
    assert next_part(("part-0009", "part-0002")) == "part-0010"
