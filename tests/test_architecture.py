"""How the house is built, read off the syntax trees.

The direction of imports, the places of the heavy libraries, the size of rooms and their signs, and
habits of writing.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("schemas", "stages", "arrag_runtime", "pipeline")
MAY_IMPORT = {
    "arrag_runtime": {"arrag_runtime"},
    "schemas": {"schemas", "arrag_runtime"},
    "stages": {"schemas", "stages", "arrag_runtime"},
    "pipeline": {"schemas", "stages", "arrag_runtime", "pipeline"},
    "cli": {"schemas", "stages", "arrag_runtime", "pipeline"},
}
FILES = [
    *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))),
    ROOT / "cli.py",
]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in FILES}
ALL_TREES = TREES | {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for name in ("tests", "benchmarks")
    for path in sorted((ROOT / name).rglob("*.py"))
}
ROOMS = sorted({str(Path(path).parent) for path in ALL_TREES} - {".", "benchmarks"})
LANCE_WRITES = frozenset(
    [
        "write_dataset",
        "write_fragments",
        "lance_write_fragments",
        "commit",
        "commit_batch",
        "delete",
        "merge_insert",
        "add_columns",
        "drop_columns",
        "alter_columns",
        "create_index",
        "create_scalar_index",
        "compact_files",
        "optimize",
        "write_lance",
        "cleanup_old_versions",
        "restore",
        "delete_rows",
    ]
)


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of all modules that are imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def called(tree: ast.AST) -> set[str]:
    """The last names of everything that is called in a file."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}


def named(tree: ast.AST) -> set[str]:
    """What a file takes from objects and modules: attributes, and names that it imports."""
    nodes = list(ast.walk(tree))
    taken = {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return taken | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def roots(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(tree)}


def module(path: str) -> str:
    """The name by which a file is imported; that of a room for its `__init__.py`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def outside_functions(tree: ast.Module) -> ast.Module:
    """A file without the bodies of its functions: what runs when it is imported."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

    kept = WithoutFunctions().visit(ast.parse(ast.unparse(tree)))
    assert isinstance(kept, ast.Module)
    return kept


def modules_imported(tree: ast.AST, known: Set[str]) -> set[str]:
    """Those of the known modules that a file imports anywhere, by themselves or something in them."""
    found = set(imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names
            if names <= known:
                # What is imported are modules, and nothing of the room itself.
                found.discard(node.module or "")
    return found & known


def circle(graph: Mapping[str, Set[str]]) -> list[str]:
    """The modules of an import circle in their order, the first at the end again; none if none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def splats(tree: ast.AST) -> list[int]:
    """The lines with calls in which a literal tuple or list is splatted."""
    arguments = (a for node in ast.walk(tree) if isinstance(node, ast.Call) for a in node.args)
    return [
        argument.lineno
        for argument in arguments
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Tuple | ast.List)
    ]


def cut_docstrings(tree: ast.AST) -> list[int]:
    """The lines of docstrings, those of fields too, whose first sentence a blank line cuts."""
    strings = (
        (node.lineno, node.value.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    )
    paragraphs = ((line, text.strip().partition("\n\n")) for line, text in strings)
    return [line for line, (first, cut, _) in paragraphs if cut and first.rstrip()[-1] not in ".:?"]


def files_importing(package: str) -> set[str]:
    return {path for path, tree in TREES.items() if package in roots(tree)}


def test_the_walk_sees_every_kind_of_import_and_call() -> None:
    """What the tests below rely on: imports inside functions, dotted, aliased; calls likewise."""
    source = (
        "import a.b as c\nif 1:\n  from d.e import f\ndef g():\n  import h; h.x.commit(); print(1)"
    )
    assert set(imported(ast.parse(source))) == {"a.b", "d.e", "h"}
    assert called(ast.parse(source)) == {"commit", "print"}
    assert named(ast.parse(source)) == {"f", "x", "commit"}
    assert {path.split("/")[0] for path in TREES} == {*PACKAGES, "cli.py"}
    assert len(TREES) > 25


@pytest.mark.parametrize("path", TREES)
def test_imports_run_one_way(path: str) -> None:
    """arrag_runtime ← schemas ← stages ← pipeline ← cli, by full names."""
    found = roots(TREES[path])
    assert "" not in found, "a relative import"
    ours = found & {*PACKAGES, "cli", "tests", "benchmarks"}
    assert ours <= MAY_IMPORT[path.split("/")[0].removesuffix(".py")]


def test_no_import_circle() -> None:
    """Imports inside functions count too, but for those by which a room opens one of its modules.

    `arrag_runtime`, `tokenizers` and `backends` load what they name by its first use.
    """
    known = {module(path) for path in TREES}
    graph = {}
    for path, tree in TREES.items():
        at_import = outside_functions(tree) if path.endswith("__init__.py") else tree
        graph[module(path)] = modules_imported(at_import, known) - {module(path)}
    assert sum(map(len, graph.values())) > 300
    assert circle(graph) == []


def test_circles_are_found() -> None:
    """What the test above relies on."""
    known = {"a", "a.b", "a.c"}
    for text, found in (
        ("import a.b", {"a.b"}),
        ("from a import b", {"a.b"}),
        ("from a.b import something", {"a.b"}),
        ("from a import something, b", {"a", "a.b"}),
        ("def f():\n  from a import c", {"a.c"}),
        ("import numpy", set()),
    ):
        assert modules_imported(ast.parse(text), known) == found
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert len(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == 4
    tree = ast.parse("import a\nclass C:\n  def f(self): import b\ndef g(): import c")
    assert set(imported(outside_functions(tree))) == {"a"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_small_and_say_what_is_in_them(room: str) -> None:
    """At most 15 files beside `__init__.py`, which names a part where there are more than three."""
    files = [Path(path).stem for path in ALL_TREES if str(Path(path).parent) == room]
    modules = set(files) - {"__init__"}
    assert len(modules) <= 15
    if not room.startswith("tests"):
        rooms = {Path(other).name for other in ROOMS if str(Path(other).parent) == room}
        doc = ast.get_docstring(ALL_TREES[f"{room}/__init__.py"])
        assert doc
        named = {name for quoted in re.findall(r"`([\w.]+)`", doc) for name in quoted.split(".")}
        assert len(modules) + len(rooms) <= 3 or named & (modules | rooms)


@pytest.mark.parametrize("path", ALL_TREES)
def test_no_sentence_is_cut_by_a_blank_line(path: str) -> None:
    """A docstring begins with a whole sentence."""
    assert cut_docstrings(ALL_TREES[path]) == []


@pytest.mark.parametrize("path", ALL_TREES)
def test_no_literal_is_splatted_into_a_call(path: str) -> None:
    """`f(*(a, b), c)` hides which argument is which; `f(a, b, c)` says the same."""
    assert splats(ALL_TREES[path]) == []


def test_habits_of_writing_are_seen() -> None:
    """What the tests of docstrings and of calls rely on."""
    whole, cut = '"""Whole.\n\nMore."""', '"""Cut in\n\nthe middle."""'
    assert cut_docstrings(ast.parse(f"{whole}\nx = 1\n{whole}\n'short'")) == []
    assert cut_docstrings(ast.parse(f"{whole}\nclass C:\n    x: int = 1\n    {cut}")) == [6]
    assert splats(ast.parse("f(*a, *b(), **c)\n(*(1, 2), 3)")) == []
    assert splats(ast.parse("f(1, *(a, b))\ng(\n  *[a])")) == [1, 3]


def test_ray_is_imported_in_the_pipeline_only() -> None:
    """Stages and the runtime work without Ray."""
    users = files_importing("ray")
    assert users
    assert {path.split("/")[0] for path in users} == {"pipeline"}


def test_autofaiss_is_imported_in_one_file() -> None:
    """Only building an index needs autofaiss."""
    assert files_importing("autofaiss") == {"stages/index/faiss_index.py"}


def test_lance_is_written_in_three_files() -> None:
    """For what builds bring, what removals delete, and training sets; others that import it read."""
    writers = {
        "stages/tables/committer.py",
        "stages/tables/deletion.py",
        "stages/tables/row_table.py",
    }
    for path in writers:
        assert named(TREES[path]) & LANCE_WRITES
    for path in files_importing("lance") - writers:
        assert not named(TREES[path]) & LANCE_WRITES, path
    for path, tree in TREES.items():
        if path not in writers:
            assert not named(tree) & {"write_dataset", "write_lance", "merge_insert"}, path


def test_schemas_need_numpy_and_pyarrow_only() -> None:
    """What is stored can be read wherever these two are."""
    for path, tree in TREES.items():
        if path.startswith("schemas/"):
            needed = {"numpy", "pyarrow", "schemas", "arrag_runtime"}
            assert roots(tree) - sys.stdlib_module_names <= needed, path


def test_schemas_know_the_format_and_what_a_setting_is() -> None:
    """Of the runtime nothing else, so that reading a table or settings loads nothing of it."""
    for path, tree in TREES.items():
        if path.startswith("schemas/"):
            ours = {name for name in imported(tree) if name.startswith("arrag_runtime")}
            allowed = ("arrag_runtime.format", "arrag_runtime.settings")
            assert all(name.startswith(allowed) for name in ours), path


def test_nothing_prints_but_the_command_line() -> None:
    """Everything else returns values, logs or raises."""
    printing = {path for path, tree in TREES.items() if "print" in called(tree)}
    assert printing <= {"cli.py"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("cli", "torch transformers ray faiss autofaiss lance pandas pyarrow PIL numba"),
        (
            "schemas.tables, arrag_runtime.format.manifest, schemas.records",
            "torch ray faiss lance pandas PIL",
        ),
        (
            "arrag_runtime, arrag_runtime.daid, arrag_runtime.device, arrag_runtime.search.retriever",
            "torch transformers ray lance faiss autofaiss schemas stages pipeline",
        ),
        (
            ", ".join(
                f"arrag_runtime.format.{path.stem}"
                for path in sorted((ROOT / "arrag_runtime" / "format").glob("[a-z]*.py"))
            ),
            "torch transformers ray lance faiss pandas PIL",
        ),
        (
            "arrag_runtime.tokenizers, stages.sources, stages.encode.decode",
            "torch transformers ray",
        ),
        ("stages.encode.encode_images, stages.encode.extract_patches", "ray lance faiss"),
    ],
)
def test_importing_stays_light(modules: str, absent: str) -> None:
    """Heavy libraries are loaded where they are used, not where a module is imported."""
    code = f"import sys, {modules}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(absent.split()) & set(run.stdout.split())
