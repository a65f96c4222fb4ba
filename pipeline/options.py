"""A class of settings as the options of a command, and its `--config` and `--print-config`."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from arrag_runtime.settings import Setting, make, read_toml, settings_of, to_toml, values_of


def takes(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a class of settings, which it gets as its first argument.

        @app.command()
        @takes(BuildSettings)
        def build(settings: BuildSettings, quiet: Quiet = False) -> None: …

    Its other parameters stay options of its own. What a `--config` file says gives way to options
    that are typed and to environment variables.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        own_names = {_own_key(parameter): parameter.name for parameter in own}
        offered = settings_of(kind)  # type: ignore[arg-type]

        def load(context: typer.Context, file: Path | None) -> Path | None:
            if file is not None:
                read = read_toml(kind, file, others=own_names)
                typed = {s.parameter: s.typed(read[s.key]) for s in offered if s.key in read}
                others = {name: read[key] for key, name in own_names.items() if key in read}
                context.default_map = typed | others
            return file

        @wraps(command)
        def run(*, config: Path | None, print_config: bool, **given: Any) -> None:
            settings = make(kind, {s.key: s.parse(given.pop(s.parameter)) for s in offered})
            if print_config:
                others = {key: given[name] for key, name in own_names.items()}
                typer.echo(to_toml(values_of(settings) | others), nl=False)
            else:
                command(settings, **given)

        parameters = [*map(_parameter, offered), *own, *_config_parameters(load)]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(setting: Setting) -> inspect.Parameter:
    """An option as typer wants to see it."""
    kind, default = setting.type, setting.default
    if setting.many:
        kind = list[kind] if setting.option.each is None else str  # type: ignore[valid-type]
        default = default if default is MISSING or not default else setting.typed(default)
        default = default or None
    info = typer.Option(
        *setting.flags,
        min=setting.option.minimum,
        max=setting.option.maximum,
        envvar=setting.option.env,
        rich_help_panel=setting.panel,
        show_default=(setting.option.shown or True) if default is None else True,
        # A bracket that would be read as markup is escaped.
        help=re.sub(r"\[(?=[a-z#/@])", r"\\[", setting.help),
    )
    return _keyword(
        setting.parameter,
        Annotated[kind | None if default is None else kind, info],
        inspect.Parameter.empty if default is MISSING else default,
    )


def _own_key(parameter: inspect.Parameter) -> str:
    """The name in a file of an option that a command declares itself."""
    info: Any = parameter.annotation.__metadata__[0]
    names = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]
    long = next((n for n in names if n.startswith("--")), f"--{parameter.name}")
    return long.split("/")[0].lstrip("-").replace("_", "-")


def _config_parameters(load: Callable[..., Path | None]) -> list[inspect.Parameter]:
    option = partial(typer.Option, rich_help_panel="Configuration")
    reading = option(
        is_eager=True,
        callback=load,
        help="A TOML file with the names of these options; what is typed here wins.",
    )
    printing = option(
        "--print-config", help="Print what is in force, as such a file, and do nothing else."
    )
    return [
        _keyword("config", Annotated[Path | None, reading], None),
        _keyword("print_config", Annotated[bool, printing], False),
    ]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
