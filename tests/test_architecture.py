"""The direction of imports and the places of the heavy libraries, read off the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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
LANCE_WRITES = frozenset(
    (
        *("write_dataset", "write_fragments", "lance_write_fragments", "commit", "commit_batch"),
        *("delete", "merge_insert", "add_columns", "drop_columns", "alter_columns"),
        *("create_index", "create_scalar_index", "compact_files", "optimize", "write_lance"),
        *("cleanup_old_versions", "restore", "delete_rows"),
    )
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


def test_ray_is_imported_in_the_pipeline_only() -> None:
    """Stages and the runtime work without Ray."""
    users = files_importing("ray")
    assert users
    assert {path.split("/")[0] for path in users} == {"pipeline"}


def test_autofaiss_is_imported_in_one_file() -> None:
    """Only building an index needs autofaiss."""
    assert files_importing("autofaiss") == {"stages/index/faiss_index.py"}


def test_lance_is_written_in_three_files() -> None:
    """For what builds bring, what removals take out, and training sets; others that import it read."""
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
        ("arrag_runtime", "torch ray autofaiss stages pipeline"),
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
