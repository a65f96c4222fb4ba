"""Conditions: what is true, what Arrow makes of nulls and types, and what is refused."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrag_runtime.format.errors import BadInputError
from stages.sources.reading.where import needed, parse_where, table_of, taken

ROWS: list[dict[str, Any]] = [
    {"score": 0.3, "text": "a cat", "size": {"w": 3, "h": 1}, "n": 4, "odd name": True},
    {"score": 0.1, "text": "it's", "size": {"w": 1, "h": 2}, "n": 2, "odd name": False},
    {"score": None, "text": None, "size": {"w": None, "h": 5}, "n": 0, "odd name": None},
]


@pytest.mark.parametrize(
    ("text", "true_for"),
    [
        ("score > 0.28", "0"),
        ("score>.28 AND text is not null", "0"),
        ("not score > 0.28", "1"),
        ("score is null or n = 2", "12"),
        ("text like '%cat%'", "0"),
        ("text not like '%cat%'", "1"),
        ("text = 'it''s'", "1"),
        ('text = "it\'s"', "1"),
        ("n in (0, 2)", "12"),
        ("n not in (0, 2)", "0"),
        ("size.w / size.h >= 3", "0"),
        ("n / 0 > 1", "01"),
        ("n - 1 * 2 = 0", "1"),
        ("(n - 1) * 2 = 2", "1"),
        ("-1 < n and n < +1", ""),
        ("`odd name` = true", "0"),
        ("`odd name`", "0"),
        ("not `odd name`", "1"),
        ("n <> 4", "12"),
        ("n != 4 and not n == 0", "1"),
        ("true", "012"),
        ("score > 0.2 or text is null and n = 0", "02"),
        ("(score > 0.2 or text is null) and n = 0", "2"),
        ("not not n = 4", "0"),
    ],
)
def test_conditions_are_true_for(text: str, true_for: str) -> None:
    """Precedence, nulls as in SQL, fields of structs, quoted names."""
    if "+1" in text:
        with pytest.raises(BadInputError, match=r"\+1"):
            parse_where(text)
        return
    where = parse_where(text)
    assert "".join(str(n) for n in where.mask(table_of(ROWS)).nonzero()[0]) == true_for
    assert parse_where(where.text) == where


def test_one_spelling_for_the_ledger() -> None:
    """Spacing, case of words and signs do not make another condition; values do."""
    assert (
        parse_where("a  =1 AND b").text == parse_where("(a == 1) and b").text == "((a = 1) and b)"
    )
    assert parse_where("a = 'x'").text != parse_where("a = 'X'").text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("score >", "its end"),
        ("score > 1 2", "'2'"),
        ("(score > 1", r"expected '\)'"),
        ("score ; drop", "'; drop'"),
        ("__import__('os')", r"\('os'\)"),
        ("score in 3", r"expected '\('"),
        ("text like score", "like"),
        ("score not null", "expected 'in' or 'like'"),
        ("(" * 200, "50 levels"),
        ("and", "expected a column"),
    ],
)
def test_what_cannot_be_read_is_pointed_at(text: str, said: str) -> None:
    """One line with the place where it stops making sense."""
    with pytest.raises(BadInputError, match=said) as caught:
        parse_where(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["text > 3", "n", "n and true", "text + 1 = 2", "size > 1"])
def test_what_cannot_be_computed_names_the_types(text: str) -> None:
    with pytest.raises(BadInputError, match=r"cannot be computed.* is ") as caught:
        parse_where(text).mask(table_of(ROWS))
    assert "\n" not in str(caught.value)


def test_numbers_beyond_63_bits() -> None:
    """Ids and hashes are often unsigned; what no column can hold is refused like other types."""
    table = pa.table({"i": pa.array([2**63, 2**63 + 1, 7], pa.uint64())})
    assert parse_where(f"i = {2**63}").mask(table).tolist() == [True, False, False]
    with pytest.raises(BadInputError, match="i is uint64"):
        parse_where(f"i = {2**64}").mask(table)
    with pytest.raises(BadInputError, match="n is int64"):
        parse_where(f"n = {2**64}").mask(table_of(ROWS))


def test_columns_that_do_not_exist_are_refused_with_those_that_do() -> None:
    """Every column of the expression counts, by its top-level name."""
    where = parse_where("size.w > 1 and nothing = 2 or n < 3")
    assert where.columns == ("size", "nothing", "n")
    with pytest.raises(BadInputError, match=r"'nothing'.*score, text, size"):
        where.strict_mask(table_of(ROWS))
    assert needed("n > 1", ["score < 2", "n < 5"]) == ("n", "score")


@pytest.mark.parametrize(
    "text", ["gone > 1", "gone = 'x'", "gone like 'x'", "gone", "not gone", "gone + 1 > 0"]
)
def test_a_column_without_values_is_never_true(text: str) -> None:
    """A shard may lack what others have: there it is null."""
    assert not parse_where(text).mask(table_of(ROWS)).any()
    assert not parse_where(text).mask(pa.table({"gone": pa.nulls(3)})).any()


@given(
    values=st.lists(st.one_of(st.none(), st.integers(-3, 3)), max_size=12),
    low=st.integers(-3, 3),
    high=st.integers(-3, 3),
)
def test_what_is_left_out_is_the_rest(values: list[int | None], low: int, high: int) -> None:
    """`taken` without a condition is everything that the condition is not true for."""
    table = pa.table({"v": pa.array(values, pa.int64())})
    first = taken(table, f"v > {low}")
    rest = taken(table, None, [f"v > {low}", f"v < {high}"])
    for value, one, two in zip(values, first, rest, strict=True):
        assert one == (value is not None and value > low)
        assert two == (value is None or not (value > low or value < high))


def test_rows_of_mixed_kinds_become_text() -> None:
    """Metadata from the outside holds a number here and a list there; halves of surrogates too."""
    table = table_of([{"a": 1}, {"a": [2], "b": "\ud800"}])
    assert table.num_rows == 2
    assert parse_where("a like '%2%'").mask(table).tolist() == [False, True]
    assert table_of([{}, {}]).num_rows == 2
