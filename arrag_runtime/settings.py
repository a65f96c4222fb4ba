"""What is known of a setting besides its name, type and default, and what follows from that.

A class of settings is a frozen dataclass. A field that users may set carries an `Option` in its
annotation, and its docstring is the help text, so default, bounds, help and flags stand once:

    min_side: Annotated[int, Option(minimum=1)] = 32
    \"\"\"Reject pictures with a shorter side.\"\"\"

`check` holds a value to its bounds and choices, `settings_of` lists the options of a class,
`values_of` and `make` go from settings to named values and back, `to_toml` and `read_toml` to a file.
Needs the standard library only.
"""

import ast
import inspect
import json
import keyword
import tomllib
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache, reduce
from itertools import pairwise
from operator import ge, gt, le, lt, or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from arrag_runtime.format.errors import BadInputError

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a field is given on the command line and in a file, and which values it may have."""

    flags: str = ""
    """As in "--input -i"; by default the field's name."""
    minimum: float | None = None
    """The smallest value."""
    maximum: float | None = None
    """The largest value."""
    above: float | None = None
    """A bound that values must exceed."""
    below: float | None = None
    """A bound that values must stay under."""
    shown: str | None = None
    """What a default of None stands for, in words."""
    env: str | None = None
    """An environment variable that sets it."""
    panel: str | None = None
    """The heading of its part of the help; by default its group's."""
    each: str | None = None
    """What one of several values is called, where they are typed as one text with commas."""
    example: str = ""
    """Such a text."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Marks a field that holds further settings, whose options are offered beside the others."""

    panel: str
    """The heading of their part of the help."""
    only: tuple[str, ...] = ()
    """The fields that are offered; all by default."""


Database = Annotated[str | Path, Option(flags="--db", env="ARRAG_DB")]
Databases = Annotated[tuple[str | Path, ...], Option(flags="--db", env="ARRAG_DB")]
DATABASE = "arrag-db"
"""The folder of a database where none is named."""
_IN_TOML: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
"""How values of a type may stand in a file, and in words."""


@dataclass(frozen=True)
class Setting:
    """A field of settings that is an option."""

    home: type
    """The class that has the field."""
    path: tuple[str, ...]
    """The names that lead to it, through groups."""
    type: Any
    """bool, int, float, str, Path or a Literal: of the value, or of each of several."""
    many: bool
    """Whether the value is a tuple of them."""
    default: Any
    """MISSING where a value must be given."""
    option: Option
    panel: str | None

    @property
    def flags(self) -> tuple[str, ...]:
        """As they are typed; a switch that is on can be turned off."""
        if self.option.flags:
            return tuple(self.option.flags.split())
        name = f"--{self.path[-1].replace('_', '-')}"
        return (f"{name}/--no-{name[2:]}",) if self.default is True else (name,)

    @property
    def flag(self) -> str:
        """The long one, without its counterpart."""
        return next((f for f in self.flags if f.startswith("--")), self.flags[0]).split("/")[0]

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.flag.lstrip("-")

    @property
    def parameter(self) -> str:
        """Its name as a parameter in Python."""
        name = self.key.replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name

    @property
    def help(self) -> str:
        """The docstring below the field, on one line; empty where there is no source text."""
        return _field_docs(self.home).get(self.path[-1], "")

    def check(self, value: Any) -> None:
        """Raise BadInputError for a value out of bounds, or not among the choices."""
        if value is None or self.many:
            return
        if self.choices and value not in self.choices:
            listed = ", ".join(self.choices)
            raise BadInputError(f"unknown {self.flag} '{value}'; choose one of {listed}")
        own = self.option
        bounds = ((own.minimum, ge), (own.above, gt), (own.maximum, le), (own.below, lt))
        if not all(bound is None or holds(value, bound) for bound, holds in bounds):
            raise BadInputError(f"{self.flag} is {value}; give {self._range()}")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values it may have; none where any will do."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def _range(self) -> str:
        own = self.option
        least = f"{own.minimum}" if own.above is None else f"more than {own.above}"
        most = own.maximum if own.below is None else f"below {own.below}"
        if most is not None:
            return f"{least} to {most}"
        return f"{least} or more" if own.above is None else least

    def parse(self, given: Any) -> Any:
        """The value of the field, from what a command line gives. Raises BadInputError."""
        if not self.many:
            return given
        if self.option.each is None:
            return tuple(given or ())
        if given is None:
            return self.default
        parts = [part.strip() for part in given.split(",")]
        example = self.option.example
        if self.type is int:
            try:
                return tuple(int(part) for part in parts)
            except ValueError as error:
                raise BadInputError(
                    f"{self.flag} '{given}' is no list of numbers; write them like '{example}'"
                ) from error
        if not any(parts):
            raise BadInputError(
                f"{self.flag} '{given}' names no {self.option.each}; write e.g. '{example}'"
            )
        return tuple(part for part in parts if part)

    def typed(self, value: Any) -> Any:
        """What a command line would give for this value; None where it would not be named."""
        if self.many and self.option.each is not None:
            return ",".join(map(str, value)) if value else None
        return [str(one) if self.type is str else one for one in value] if self.many else value

    def from_toml(self, value: Any, name: str) -> Any:
        """The value of the field, from what stands in a file. Raises BadInputError for its type."""
        allowed, wanted = _IN_TOML.get(self.type, ((str,), "a text in quotes"))
        parts = value if self.many else [value]
        if not isinstance(parts, list) or not all(type(part) in allowed for part in parts):
            if self.many:
                wanted = "a list such as " + ("[1, 2]" if self.type is int else '["…"]')
            raise BadInputError(f"{name} is {value!r}; give {wanted}")
        made = tuple(self.type(one) if self.type in (float, Path) else one for one in parts)
        return made if self.many else made[0]


@dataclass(frozen=True)
class _Nested:
    type: Any
    optional: bool
    group: Group


@cache
def _members(settings: Any) -> dict[str, "Setting | _Nested"]:
    """The fields of a class that are options or groups of them; others cannot be set by users."""
    found: dict[str, Setting | _Nested] = {}
    for field in fields(settings):
        for mark in getattr(field.type, "__metadata__", ()):
            kind = get_args(field.type)[0]
            optional = types.NoneType in get_args(kind)
            if optional:
                kind = reduce(or_, (one for one in get_args(kind) if one is not types.NoneType))
            if isinstance(mark, Group):
                found[field.name] = _Nested(kind, optional, mark)
            elif isinstance(mark, Option):
                many = get_origin(kind) is tuple
                kind = get_args(kind)[0] if many else kind
                # What may be a text or a path is typed as a text.
                kind = str if get_origin(kind) in (Union, types.UnionType) else kind
                found[field.name] = Setting(
                    settings, (field.name,), kind, many, field.default, mark, mark.panel
                )
    return found


@cache
def settings_of(settings: Any) -> tuple[Setting, ...]:
    """The options of a class of settings, those of its groups among them."""
    found: list[Setting] = []
    for name, member in _members(settings).items():
        if isinstance(member, Setting):
            found.append(member)
            continue
        for inner in settings_of(member.type):
            if not member.group.only or inner.path[0] in member.group.only:
                path, panel = (name, *inner.path), inner.panel or member.group.panel
                default = inner.default
                if default is MISSING and member.optional:
                    default = None
                found.append(replace(inner, path=path, default=default, panel=panel))
    return tuple(found)


def check(settings: Any) -> None:
    """Raise BadInputError for the first of its own fields that is out of bounds."""
    for name, member in _members(settings.__class__).items():
        if isinstance(member, Setting):
            member.check(getattr(settings, name))


def values_of(settings: Any) -> dict[str, Any]:
    """The settings in force by their names in a file."""
    found: dict[str, Any] = {}
    for setting in settings_of(settings.__class__):
        value: Any = settings
        for name in setting.path:
            value = getattr(value, name, None)  # of a group that is None, nothing
        found[setting.key] = value
    return found


def make(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings from values by their names in a file; what is not named keeps its default.

    Raises BadInputError for what the class refuses, or for part of a group whose main value is not
    given.
    """
    settings: Any = kind
    given: dict[str, Any] = {}
    for name, member in _members(settings).items():
        if isinstance(member, Setting):
            if member.key in values:
                given[name] = values[member.key]
            continue
        offered = [s for s in settings_of(settings) if s.path[0] == name]
        inner = {s.key: values[s.key] for s in offered if s.key in values}
        needed = [s for s in settings_of(member.type) if s.default is MISSING]
        if not member.optional or all(inner.get(s.key) is not None for s in needed):
            given[name] = make(member.type, inner)
            continue
        main = needed[0].flag
        for part in offered:
            if part.flag != main and inner.get(part.key, part.default) != part.default:
                raise BadInputError(f"{part.flag} says more about a {main}; give {main} too")
    return kind(**given)


def to_toml(values: Mapping[str, Any]) -> str:
    """A line for each value that is not None."""
    return "".join(f"{key} = {_toml(v)}\n" for key, v in values.items() if v is not None)


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)  # json spells infinity in another way
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def read_toml(settings: type, path: Path, *, others: Collection[str] = ()) -> dict[str, Any]:
    """The values in a file by name, each checked; `others` are names that may stand there too.

    Raises BadInputError for a file that cannot be read, an unknown name, a wrong type or a value
    that is out of bounds.
    """
    try:
        read = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read --config '{path}': {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"--config '{path}' is no TOML: {error}") from error
    known = {setting.key: setting for setting in settings_of(settings)}
    found: dict[str, Any] = {}
    for name, value in read.items():
        key = name.replace("_", "-")
        if key in others:
            found[key] = value
            continue
        if key not in known:
            near = get_close_matches(key, [*known, *others], 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the names, less the dashes"
            raise BadInputError(f"--config '{path}' has an unknown name '{name}'; {hint}")
        try:
            found[key] = known[key].from_toml(value, name)
            known[key].check(found[key])
        except BadInputError as error:
            raise BadInputError(f"--config '{path}': {error}") from error
    return found


@cache
def _field_docs(settings: type) -> Mapping[str, str]:
    """The docstring below each field of a class, on one line; read off the source text."""
    try:
        (source,) = ast.parse(inspect.getsource(settings)).body
    except (OSError, TypeError, SyntaxError):
        return {}
    return {
        ast.unparse(field.target): inspect.cleandoc(str(doc.value.value)).replace("\n", " ")
        for field, doc in pairwise(cast(ast.ClassDef, source).body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
        if isinstance(doc.value, ast.Constant)
    }
