"""The rules of the house, read from its imports."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up: a module imports only from its own wing and from those before it.
WINGS = [
    "errors", "schema", "config", "logs", "pages", "parallel", "codecs", "data", "models", "generation", "training",
    "checkpoints", "evaluation", "trained_model", "study", "session", "comparison",
]  # fmt: skip


def parsed(path):
    return ast.parse(path.read_text())


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    """(wing, dotted name below textgen, path) of every module."""
    for path in sorted((ROOT / "textgen").rglob("*.py")):
        parts = path.relative_to(ROOT / "textgen").with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            yield parts[0], ".".join(parts), path


MODULES = list(modules())


def test_every_module_stands_in_a_wing():
    assert {wing for wing, _, _ in MODULES} == set(WINGS)


@pytest.mark.parametrize(("wing", "name", "path"), MODULES, ids=[name for _, name, _ in MODULES])
def test_a_module_imports_only_from_its_own_wing_and_from_lower_ones(wing, name, path):
    for imported in imports(ast.walk(parsed(path))):
        if imported.startswith("textgen."):
            other = imported.split(".")[1]
            if other in WINGS:
                assert WINGS.index(other) <= WINGS.index(wing), f"{name} imports {imported}"


def test_no_modules_import_each_other():
    names = {name for _, name, _ in MODULES}
    graph = {}
    for _, name, path in MODULES:
        imported = {full.removeprefix("textgen.") for full in imports(ast.walk(parsed(path)))}
        graph[name] = (imported & names) - {name} - {".".join(name.split(".")[:i]) for i in range(1, 4)}
    list(TopologicalSorter(graph).static_order())


def test_only_the_wings_that_should_know_a_library_do():
    for wing, name, path in MODULES:
        for imported in imports(ast.walk(parsed(path))):
            if imported.startswith("flax.linen"):
                assert wing == "models", f"{name} imports flax.linen"
            if imported.startswith("ml_collections"):
                assert wing in {"config", "session"}, f"{name} imports ml_collections"
            assert not imported.startswith(("configs", "experiments", "tensorflow")), f"{name} imports {imported}"
            if wing == "generation":
                assert not imported.startswith("textgen.models"), f"{name} imports {imported}"


def test_experiments_are_thin():
    of_the_benchmark = {"benchmark", "ours", "peers"}
    for path in (ROOT / "experiments").glob("*.py"):
        names = {node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)}
        assert path.stem in of_the_benchmark | {"__init__"} or names == {"main"}, f"{path.name} holds logic: {names}"
