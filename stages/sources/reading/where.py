"""`--where`: which rows of a source are its inputs, as an expression that Arrow evaluates.

In: text such as `clip_l14_similarity_score > 0.28 and not (text is null)`. Out: a `Where` that
turns a table into a mask, or a BadInputError that points at what cannot be read. Nulls follow SQL:
a row is taken where the whole expression is true. The language is closed: comparisons (= == != <>
< <= > >=), `and`, `or`, `not`, `in (…)`, `like '%x_'`, `is null`, `+ - * /`, numbers, 'text', true,
false, and columns (`a.b` is a field of a struct, `` `odd name` `` any name).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from arrag_runtime.format.errors import BadInputError

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)
    |(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<quoted>`[^`]+`)
    |(?P<name>[^\W\d][\w.]*)
    |(?P<sign><=|>=|==|!=|<>|[<>=+\-*/(),])
    |(?P<odd>\S))""",
    re.VERBOSE,
)
_WORDS = frozenset(("and", "or", "not", "in", "is", "null", "like", "true", "false"))
_COMPARISONS = {sign: sign for sign in ("=", "!=", "<", "<=", ">", ">=")} | {"==": "=", "<>": "!="}
_MAX_DEPTH = 50


@dataclass(frozen=True)
class _Column:
    """A column, or with dots a field of a struct column."""

    name: str


@dataclass(frozen=True)
class _Literal:
    """A number, a text or a truth value."""

    value: float | int | str | bool


@dataclass(frozen=True)
class _Call:
    """A function of `_FUNCTIONS` applied to other nodes."""

    function: str
    arguments: tuple["_Node", ...]


_Node = _Column | _Literal | _Call


_FUNCTIONS: dict[str, Callable[..., Any]] = {
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
    "/": lambda left, right: pc.divide(pc.cast(left, pa.float64()), pc.cast(right, pa.float64())),
    "like": lambda values, pattern: pc.match_like(values, pattern.as_py()),
    "is null": pc.is_null,
}
_TYPES_OF_NULLS = dict.fromkeys(("and", "or", "not"), pa.bool_()) | {"like": pa.string()}
_TYPES_OF_NULLS |= dict.fromkeys(("+", "-", "*"), pa.float64())
"""What a column that holds nothing but nulls is taken for, where Arrow asks for a type."""


@dataclass(frozen=True)
class Where:
    """A parsed expression."""

    node: _Node

    @property
    def text(self) -> str:
        """The expression as the ledger keeps it: one spelling, whatever the spacing was."""
        return _spell(self.node)

    @property
    def columns(self) -> tuple[str, ...]:
        """The top-level columns it reads, in their order."""
        return tuple(dict.fromkeys(name.split(".")[0] for name in _columns_of(self.node)))

    def strict_mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """As `mask`; raises BadInputError, listing what exists, for a column that is not there."""
        names = [name for name in table.column_names if name]
        for column in self.columns:
            if column not in names:
                raise BadInputError(
                    f"--where names the column '{column}', which this source does not have; it has"
                    f" {', '.join(names) or 'none'}"
                )
        return self.mask(table)

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
            known = [name for name in self.columns if name in table.column_names]
            types = [f"{name} is {table.schema.field(name).type}" for name in known]
            reason = str(error).splitlines()[0]
            raise BadInputError(
                f"--where '{self.text}' cannot be computed ({reason}; {', '.join(types)});"
                " compare numbers with numbers and text with 'text'"
            ) from error
        return np.array(truth, bool)


def parse_where(text: str) -> Where:
    """The expression in `text`. Raises BadInputError that points at what it cannot read."""
    parser = _Parser(text)
    node = parser.expression()
    if parser.take("") is None:
        raise parser.error("expected the end, 'and' or 'or'")
    return Where(node)


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
    texts = without if where is None else (where, *without)
    return tuple(dict.fromkeys(name for text in texts for name in parse_where(text).columns))


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        self._next = 0
        self._depth = 0
        for match in _TOKEN.finditer(text):
            kind = str(match.lastgroup)
            word, start = match[kind], match.start(kind)
            if kind == "odd":
                raise self._bad(start, "cannot read it")
            if kind == "name" and word.lower() in _WORDS:
                kind, word = "sign", word.lower()
            self._tokens.append((kind, word, start))
        if not self._tokens:
            raise BadInputError(
                "--where is empty; give a condition such as 'clip_l14_similarity_score > 0.28'"
            )
        # The end is a token too.
        self._tokens.append(("sign", "", len(text)))

    def error(self, what: str) -> BadInputError:
        """The error for what stands next."""
        return self._bad(self._tokens[self._next][2], what)

    def _bad(self, at: int, what: str) -> BadInputError:
        rest = self._text[at : at + 20].replace("\n", " ") or "its end"
        return BadInputError(
            f"--where '{self._text}' stops making sense at '{rest}': {what}; write for example"
            ' "clip_l14_similarity_score > 0.28 and text is not null"'
        )

    def take(self, *expected: str) -> str | None:
        """The next sign or word where it is one of these, stepping over it."""
        kind, word, _ = self._tokens[self._next]
        if kind != "sign" or word not in expected:
            return None
        self._next += 1
        return word

    def _require(self, expected: str) -> None:
        if self.take(expected) is None:
            raise self.error(f"expected '{expected}'")

    def _listed(self, part: Callable[[], _Node], separator: str) -> list[_Node]:
        """One part, or several with this sign or word between them."""
        nodes = [part()]
        while self.take(separator):
            nodes.append(part())
        return nodes

    def _computed(self, part: Callable[[], _Node], *signs: str) -> _Node:
        """One part, or several joined by these signs from left to right."""
        node = part()
        while sign := self.take(*signs):
            node = _Call(sign, (node, part()))
        return node

    def expression(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.error(f"more than {_MAX_DEPTH} levels of parentheses")
        node = _joined("or", self._listed(self._conjunction, "or"))
        self._depth -= 1
        return node

    def _conjunction(self) -> _Node:
        return _joined("and", self._listed(self._negation, "and"))

    def _negation(self) -> _Node:
        negated = False
        while self.take("not"):
            negated = not negated
        node = self._comparison()
        return _Call("not", (node,)) if negated else node

    def _comparison(self) -> _Node:
        left = self._sum()
        if sign := self.take(*_COMPARISONS):
            return _Call(_COMPARISONS[sign], (left, self._sum()))
        is_ = self.take("is")
        negated = self.take("not")
        if is_:
            self._require("null")
            node: _Node = _Call("is null", (left,))
        elif self.take("in"):
            self._require("(")
            values = self._listed(self._sum, ",")
            self._require(")")
            node = _joined("or", [_Call("=", (left, value)) for value in values])
        elif self.take("like"):
            pattern = self._primary()
            if not (isinstance(pattern, _Literal) and isinstance(pattern.value, str)):
                raise self.error("'like' wants a text such as '%cat%'")
            node = _Call("like", (left, pattern))
        elif negated:
            raise self.error("expected 'in' or 'like' after 'not'")
        else:
            return left
        return _Call("not", (node,)) if negated else node

    def _sum(self) -> _Node:
        return self._computed(self._product, "+", "-")

    def _product(self) -> _Node:
        return self._computed(self._primary, "*", "/")

    def _primary(self) -> _Node:
        if self.take("("):
            node = self.expression()
            self._require(")")
            return node
        if self.take("-"):
            number = self._primary()
            if isinstance(number, _Literal) and not isinstance(number.value, str | bool):
                return _Literal(-number.value)
            return _Call("-", (_Literal(0), number))
        if word := self.take("true", "false"):
            return _Literal(word == "true")
        kind, word, _ = self._tokens[self._next]
        if kind == "sign":
            raise self.error("expected a column or a value")
        self._next += 1
        if kind == "number":
            return _Literal(int(word) if word.isdigit() else float(word))
        if kind == "text":
            return _Literal(word[1:-1].replace(word[0] * 2, word[0]))
        return _Column(word.strip("`"))


def _joined(function: str, nodes: Sequence[_Node]) -> _Node:
    return nodes[0] if len(nodes) == 1 else _Call(function, tuple(nodes))


def _columns_of(node: _Node) -> list[str]:
    if isinstance(node, _Column):
        return [node.name]
    if isinstance(node, _Call):
        return [name for argument in node.arguments for name in _columns_of(argument)]
    return []


def _spell(node: _Node) -> str:
    if isinstance(node, _Column):
        plain = re.fullmatch(r"[^\W\d][\w.]*", node.name) and node.name.lower() not in _WORDS
        return node.name if plain else f"`{node.name}`"
    if isinstance(node, _Literal):
        if isinstance(node.value, str):
            return "'" + node.value.replace("'", "''") + "'"
        return str(node.value).lower()
    if node.function == "not":
        return f"not {_spell(node.arguments[0])}"
    if node.function == "is null":
        return f"({_spell(node.arguments[0])} is null)"
    return "(" + f" {node.function} ".join(_spell(a) for a in node.arguments) + ")"


def _evaluate(node: _Node, table: pa.Table) -> Any:
    if isinstance(node, _Literal):
        large = type(node.value) is int and node.value >= 1 << 63
        return pa.scalar(node.value, pa.uint64() if large else None)
    if isinstance(node, _Call):
        kind = _TYPES_OF_NULLS.get(node.function)
        values = [_typed(_evaluate(a, table), kind) for a in node.arguments]
        return _FUNCTIONS[node.function](*values)
    if node.name in table.column_names:
        return table[node.name]
    name, *path = node.name.split(".")
    if name not in table.column_names or not pa.types.is_struct(table.schema.field(name).type):
        return pa.chunked_array([pa.nulls(table.num_rows)])
    return pc.struct_field(table[name], path)


def _typed(value: Any, kind: pa.DataType | None) -> Any:
    return pc.cast(value, kind) if kind is not None and pa.types.is_null(value.type) else value
