"""What the product consists of, read off its syntax trees: files, lines, rooms, public names.

Run as `python -m tests.structure [FOLDER]` it prints the figures of a checkout, this one by default.
A public name is a class, function or variable at the top level of a module without a leading
underscore.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("arrag_runtime", "schemas", "stages", "pipeline", "cli.py")
"""What is installed, in the direction of imports."""


def product_files(root: Path = ROOT) -> list[Path]:
    """The product's Python files."""
    found = []
    for name in PRODUCT:
        place = root / name
        found += [place] if place.is_file() else sorted(place.rglob("*.py"))
    return found


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module defines at its top level; imports are none."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def public_names(root: Path = ROOT) -> dict[str, list[str]]:
    """Every public name, and the files that define it."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in product_files(root):
        for name in defined(ast.parse(path.read_text())):
            if not name.startswith("_"):
                places[name].append(str(path.relative_to(root)))
    return places


def figures(root: Path = ROOT) -> str:
    """The figures as lines of text."""
    files = product_files(root)
    lines = sum(len(path.read_text().splitlines()) for path in files)
    names = public_names(root)
    several = {name: places for name, places in names.items() if len(places) > 1}
    rooms: dict[str, int] = defaultdict(int)
    for path in files:
        rooms[str(path.parent.relative_to(root))] += path.name != "__init__.py"
    largest = max(rooms, key=lambda room: rooms[room])
    return "\n".join(
        [
            f"{lines:,} lines in {len(files)} files, {len(rooms)} rooms;"
            f" the fullest is {largest} with {rooms[largest]} files beside its __init__.py",
            f"{sum(map(len, names.values()))} public names, {len(several)} of them in several files",
            *(f"  {name}: {', '.join(places)}" for name, places in sorted(several.items())),
        ]
    )


if __name__ == "__main__":
    print(figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
