"""docs/api.md lists the public face of the runtime as the code has it.

`python -m tests.test_api` writes the list anew.
"""

import ast
from importlib import metadata
from pathlib import Path

import pytest

import arrag_runtime

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
BEGIN, END = "<!-- from the code -->\n", "<!-- to here -->\n"
Function = ast.FunctionDef


def runtime_face() -> str:
    """The public names of `arrag_runtime`: signature, what it does, and members of classes."""
    names = [name for name in arrag_runtime.__all__ if not name.startswith("_")]
    return "\n".join(_described(name) for name in sorted(names, key=str.lower))


def _described(name: str) -> str:
    home = arrag_runtime._HOMES.get(name)
    tree = _tree(home or f"arrag_runtime.{name}")
    if home is None:
        lines = [f"### `{name}`, a module", "", _paragraph(tree), ""]
        public = (n for n in tree.body if isinstance(n, Function | ast.ClassDef))
        lines += [_line(f"{name}.", n) for n in public if not n.name.startswith("_")]
        return "\n".join(lines) + "\n"
    [node] = (n for n in tree.body if isinstance(n, Function | ast.ClassDef) and n.name == name)
    lines = [f"### `{_signature('', node)}`", "", _paragraph(node), ""]
    if isinstance(node, ast.ClassDef):
        for member, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(member, ast.AnnAssign):
                lines.append(f"- `{ast.unparse(member)}`{_field_says(below)}")
            elif isinstance(member, Function) and not member.name.startswith("_"):
                if any(isinstance(decorator, ast.Attribute) for decorator in member.decorator_list):
                    continue  # A property's setter.
                lines.append(_line(f"{name}." if _has(member, "staticmethod") else ".", member))
    return "\n".join(lines).rstrip() + "\n"


def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())


def _line(before: str, node: Function | ast.ClassDef) -> str:
    """An item of a list: the signature and the docstring's first sentence or line."""
    return f"- `{_signature(before, node)}`: {_paragraph(node)}"


def _signature(before: str, node: Function | ast.ClassDef) -> str:
    """As it is called, with types; of a class its name alone."""
    if isinstance(node, ast.ClassDef):
        return before + node.name
    if _has(node, "property"):
        return f"{before}{node.name}: {_annotation(node.returns)}"
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg) and isinstance(argument.annotation, ast.Constant):
            argument.annotation = ast.parse(str(argument.annotation.value), mode="eval").body
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    return f"{before}{node.name}({arguments}) -> {_annotation(node.returns)}"


def _field_says(below: ast.stmt | None) -> str:
    """The docstring that stands below a field, in one line; nothing where there is none."""
    if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
        return ": " + " ".join(str(below.value.value).split())
    return ""


def _annotation(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node).strip("'")


def _has(node: Function, decorator: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == decorator for d in node.decorator_list)


def _paragraph(node: ast.Module | Function | ast.ClassDef) -> str:
    """A docstring's first paragraph, in one line."""
    text = ast.get_docstring(node)
    assert text, f"{getattr(node, 'name', 'the module')} has no docstring"
    return " ".join(text.split("\n\n")[0].split())


def test_the_page_lists_the_runtime_as_the_code_has_it() -> None:
    text = PAGE.read_text()
    listed = text.partition(BEGIN)[2].partition(END)[0]
    assert listed == runtime_face(), "`python -m tests.test_api` writes it anew"


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    """Also in dir(), and nothing else is."""
    for name in arrag_runtime.__all__:
        assert getattr(arrag_runtime, name) is not None
    assert set(arrag_runtime.__all__) <= set(dir(arrag_runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = arrag_runtime.nothing


def test_the_version_is_the_distributions_or_plainly_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a checkout that was never installed there is none to read."""
    assert arrag_runtime.__version__ == metadata.version("arrag")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert arrag_runtime.__version__ == "0+unknown"


def _write() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + runtime_face() + END + rest.partition(END)[2])


if __name__ == "__main__":
    _write()
