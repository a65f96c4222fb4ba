"""The language of `--where`: text to a tree of columns, literals and calls, and back to text.

In: text. Out: a `Node`, or a BadInputError that points at what cannot be read. The language is
closed: comparisons (= == != <> < <= > >=), `and`, `or`, `not`, `in (…)`, `like '%x_'`, `is null`,
`+ - * /`, numbers, 'text', true, false, and columns (`a.b` is a field of a struct, `` `odd name` ``
any name).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from arrag_runtime.format.errors import BadInputError

TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)
    |(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<quoted>`[^`]+`)
    |(?P<name>[^\W\d][\w.]*)
    |(?P<sign><=|>=|==|!=|<>|[<>=+\-*/(),]))""",
    re.VERBOSE,
)
WORDS = frozenset(("and", "or", "not", "in", "is", "null", "like", "true", "false"))
COMPARISONS = {"=": "=", "==": "=", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">"}
COMPARISONS |= {">=": ">="}
MAX_DEPTH = 50


@dataclass(frozen=True)
class Column:
    """A column, or with dots a field of a struct column."""

    name: str


@dataclass(frozen=True)
class Literal:
    """A number, a text or a truth value."""

    value: float | int | str | bool


@dataclass(frozen=True)
class Call:
    """A function of `FUNCTIONS` applied to other nodes."""

    function: str
    arguments: tuple["Node", ...]


Node = Column | Literal | Call


def parse(text: str) -> Node:
    """The tree of an expression. Raises BadInputError that points at what it cannot read."""
    parser = _Parser(text)
    node = parser.expression()
    if parser.peek() != "":
        raise parser.error("expected the end, 'and' or 'or'")
    return node


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        self._next = 0
        self._depth = 0
        at = 0
        while text[at:].strip():
            match = TOKEN.match(text, at)
            if match is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                self._tokens.append(("odd", text[at], at))
                raise self._bad(at, "cannot read it")
            kind = str(match.lastgroup)
            word, start = match[kind], match.start(kind)
            if kind == "name" and word.lower() in WORDS:
                kind, word = "word", word.lower()
            self._tokens.append((kind, word, start))
            at = match.end()
        if not self._tokens:
            raise BadInputError(
                "--where is empty; give a condition such as 'clip_l14_similarity_score > 0.28'"
            )

    def peek(self) -> str:
        """The next sign or word; "" at the end, a name or a literal."""
        if self._next == len(self._tokens):
            return ""
        kind, word, _ = self._tokens[self._next]
        return word if kind in ("sign", "word") else f"\0{kind}"

    def error(self, what: str) -> BadInputError:
        """The error for what stands next."""
        at = self._tokens[self._next][2] if self._next < len(self._tokens) else len(self._text)
        return self._bad(at, what)

    def _bad(self, at: int, what: str) -> BadInputError:
        rest = self._text[at : at + 20].replace("\n", " ") or "its end"
        return BadInputError(
            f"--where '{self._text}' stops making sense at '{rest}': {what}; write for example"
            ' "clip_l14_similarity_score > 0.28 and text is not null"'
        )

    def _take(self, *expected: str) -> str | None:
        """The next sign or word where it is one of these, stepping over it."""
        if self.peek() in expected and self._next < len(self._tokens):
            self._next += 1
            return self._tokens[self._next - 1][1]
        return None

    def _require(self, expected: str) -> None:
        if self._take(expected) is None:
            raise self.error(f"expected '{expected}'")

    def expression(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} levels of parentheses")
        nodes = [self._conjunction()]
        while self._take("or"):
            nodes.append(self._conjunction())
        self._depth -= 1
        return _joined("or", nodes)

    def _conjunction(self) -> Node:
        nodes = [self._negation()]
        while self._take("and"):
            nodes.append(self._negation())
        return _joined("and", nodes)

    def _negation(self) -> Node:
        negated = False
        while self._take("not"):
            negated = not negated
        node = self._comparison()
        return Call("not", (node,)) if negated else node

    def _comparison(self) -> Node:
        left = self._sum()
        if sign := self._take(*COMPARISONS):
            return Call(COMPARISONS[sign], (left, self._sum()))
        if self._take("is"):
            negated = self._take("not") is not None
            self._require("null")
            node: Node = Call("is null", (left,))
        else:
            negated = self._take("not") is not None
            if self._take("in"):
                node = self._membership(left)
            elif self._take("like"):
                pattern = self._primary()
                if not (isinstance(pattern, Literal) and isinstance(pattern.value, str)):
                    raise self.error("'like' wants a text such as '%cat%'")
                node = Call("like", (left, pattern))
            elif negated:
                raise self.error("expected 'in' or 'like' after 'not'")
            else:
                return left
        return Call("not", (node,)) if negated else node

    def _membership(self, left: Node) -> Node:
        self._require("(")
        nodes: list[Node] = [Call("=", (left, self._sum()))]
        while self._take(","):
            nodes.append(Call("=", (left, self._sum())))
        self._require(")")
        return _joined("or", nodes)

    def _sum(self) -> Node:
        node = self._product()
        while sign := self._take("+", "-"):
            node = Call(sign, (node, self._product()))
        return node

    def _product(self) -> Node:
        node = self._primary()
        while sign := self._take("*", "/"):
            node = Call(sign, (node, self._primary()))
        return node

    def _primary(self) -> Node:
        if self._take("("):
            node = self.expression()
            self._require(")")
            return node
        if self._take("-"):
            number = self._primary()
            if isinstance(number, Literal) and not isinstance(number.value, str | bool):
                return Literal(-number.value)
            return Call("-", (Literal(0), number))
        if word := self._take("true", "false"):
            return Literal(word == "true")
        if self._next == len(self._tokens):
            raise self.error("expected a column or a value")
        kind, word, _ = self._tokens[self._next]
        if kind in ("sign", "word"):
            raise self.error("expected a column or a value")
        self._next += 1
        if kind == "number":
            return Literal(int(word) if word.isdigit() else float(word))
        if kind == "text":
            return Literal(word[1:-1].replace(word[0] * 2, word[0]))
        return Column(word.strip("`"))


def _joined(function: str, nodes: Sequence[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else Call(function, tuple(nodes))


def columns_of(node: Node) -> list[str]:
    if isinstance(node, Column):
        return [node.name]
    if isinstance(node, Call):
        return [name for argument in node.arguments for name in columns_of(argument)]
    return []


def spell(node: Node) -> str:
    if isinstance(node, Column):
        plain = re.fullmatch(r"[^\W\d][\w.]*", node.name) and node.name.lower() not in WORDS
        return node.name if plain else f"`{node.name}`"
    if isinstance(node, Literal):
        if isinstance(node.value, str):
            return "'" + node.value.replace("'", "''") + "'"
        return str(node.value).lower()
    if node.function == "not":
        return f"not {spell(node.arguments[0])}"
    if node.function == "is null":
        return f"({spell(node.arguments[0])} is null)"
    return "(" + f" {node.function} ".join(spell(a) for a in node.arguments) + ")"
