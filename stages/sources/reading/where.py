"""`--where`: which rows of a source are its inputs, as an expression that Arrow evaluates.

In: text such as `clip_l14_similarity_score > 0.28 and not (text is null)`; its language is that of
`stages.sources.reading.where_language`. Out: a `Where` that turns a table into a mask. Nulls follow SQL: a
row is taken where the whole expression is true.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from arrag_runtime.format.errors import BadInputError
from stages.sources.reading.where_language import Call, Literal, Node, columns_of, parse, spell


def _quotient(left: Any, right: Any) -> Any:
    return pc.divide(pc.cast(left, pa.float64()), pc.cast(right, pa.float64()))


def _like(values: Any, pattern: Any) -> Any:
    return pc.match_like(values, pattern.as_py())


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *values: reduce(pc.and_kleene, values),
    "or": lambda *values: reduce(pc.or_kleene, values),
    "not": pc.invert,
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "+": pc.add,
    "-": pc.subtract,
    "*": pc.multiply,
    "/": _quotient,
    "like": _like,
    "is null": pc.is_null,
}


@dataclass(frozen=True)
class Where:
    """A parsed expression. `text` is the same for expressions that differ in spacing alone."""

    node: Node

    @property
    def text(self) -> str:
        """The expression in its one spelling, as the ledger keeps it."""
        return spell(self.node)

    @property
    def columns(self) -> tuple[str, ...]:
        """The top-level columns it reads, in their order."""
        return tuple(dict.fromkeys(name.split(".")[0] for name in columns_of(self.node)))

    def require(self, available: Iterable[str]) -> None:
        """Raise BadInputError, listing what exists, for a column that does not."""
        names = list(available)
        for column in self.columns:
            if column not in names:
                raise BadInputError(
                    f"--where names the column '{column}', which this source does not have; it has"
                    f" {', '.join(names) or 'none'}"
                )

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows it is true for, bool [rows]; a column that the table lacks holds nulls.

        Raises BadInputError where Arrow cannot compute it, naming the columns' types.
        """
        try:
            value = _evaluate(self.node, table)
            if isinstance(value, pa.Scalar):
                return np.full(table.num_rows, value.as_py() is True)
            if not pa.types.is_boolean(value.type) and not pa.types.is_null(value.type):
                raise pa.ArrowInvalid("it is no condition")
            truth = pc.fill_null(pc.cast(value, pa.bool_()), False)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            types = [
                f"{name} is {table.schema.field(name).type}"
                for name in self.columns
                if name in table.column_names
            ]
            reason = str(error).splitlines()[0]
            raise BadInputError(
                f"--where '{self.text}' cannot be computed ({reason}; {', '.join(types)});"
                " compare numbers with numbers and text with 'text'"
            ) from error
        found: npt.NDArray[np.bool_] = truth.to_numpy(zero_copy_only=False).astype(bool)
        return found


def parse_where(text: str) -> Where:
    """The expression in `text`. Raises BadInputError that points at what it cannot read."""
    return Where(parse(text))


def taken(table: pa.Table, where: str | None, without: Sequence[str] = ()) -> npt.NDArray[np.bool_]:
    """The rows for which `where` is true and none of `without` is, bool [rows]."""
    mask = np.ones(table.num_rows, bool) if where is None else parse_where(where).mask(table)
    for other in without:
        mask &= ~parse_where(other).mask(table)
    return mask


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table, so that conditions can be computed; columns of mixed kinds become text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [_column([row.get(name) for row in rows]) for name in names]
    return pa.table(columns, names=names) if names else pa.table({"": pa.nulls(len(rows))})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array([None if v is None else ascii(v) for v in values], pa.string())


def needed(where: str | None, without: Sequence[str] = ()) -> tuple[str, ...]:
    """The top-level columns that `taken` reads."""
    texts = [*([where] if where is not None else []), *without]
    return tuple(dict.fromkeys(name for text in texts for name in parse_where(text).columns))


def _evaluate(node: Node, table: pa.Table) -> Any:
    if isinstance(node, Literal):
        large = type(node.value) is int and node.value >= 1 << 63
        return pa.scalar(node.value, pa.uint64() if large else None)
    if isinstance(node, Call):
        kind = TYPES_OF_NULLS.get(node.function)
        values = [_typed(_evaluate(a, table), kind) for a in node.arguments]
        return FUNCTIONS[node.function](*values)
    if node.name in table.column_names:
        return table[node.name]
    name, *path = node.name.split(".")
    if name not in table.column_names or not pa.types.is_struct(table.schema.field(name).type):
        return pa.chunked_array([pa.nulls(table.num_rows)])
    return pc.struct_field(table[name], path)


TYPES_OF_NULLS = dict.fromkeys(("and", "or", "not"), pa.bool_()) | {"like": pa.string()}
TYPES_OF_NULLS |= dict.fromkeys(("+", "-", "*"), pa.float64())
"""What a column that holds nothing but nulls is taken for, where Arrow asks for a type."""


def _typed(value: Any, kind: pa.DataType | None) -> Any:
    return pc.cast(value, kind) if kind is not None and pa.types.is_null(value.type) else value
