"""The rules of the house, read from its imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors"},
    {"schema"},
    {"config", "plays", "tokenizers", "logs", "pages", "textmetrics"},
    {"corpora", "data", "tasks", "models", "sampling", "generate", "decoders", "decoding", "speculative"}
    | {"objectives", "optimizers", "parallel", "windows"},
    {"checkpoints", "evaluate", "samples"},
    {"train", "inference"},
    {"run", "assess", "study"},
    {"comparison.analysis", "comparison.arms", "comparison.document", "comparison.statistics"},
    {"comparison.budget", "comparison.dynamic", "comparison.ensemble", "comparison.figures", "comparison.results"},
    {"comparison.details", "comparison.jobs", "comparison.ledger", "probes"},
    {"comparison.report"},
    {"comparison.compare"},
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
# Within a layer, who may know whom.
BESIDE = {
    ("plays", "config"),
    ("tokenizers", "config"),
    ("windows", "objectives"),
    ("data", "corpora"),
    ("generate", "parallel"),
    ("generate", "sampling"),
    ("decoding", "decoders"),
    ("optimizers", "parallel"),
    ("speculative", "parallel"),
    ("run", "assess"),
}
BESIDE |= {(room, other) for room in ("decoders", "decoding", "speculative") for other in ("generate", "sampling")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(parts):
    """A module or a package; of the largest package, a module in it."""
    return ".".join(parts[:2]) if parts[0] == "comparison" else parts[0]


def rooms():
    for path in sorted((ROOT / "textgen").rglob("*.py")):
        parts = path.relative_to(ROOT / "textgen").with_suffix("").parts
        if parts not in (("__init__",), ("comparison", "__init__")):
            yield room_of(parts), path


def test_every_room_has_a_layer():
    assert {room for room, _ in rooms()} == set(LAYER)


@pytest.mark.parametrize(("room", "path"), list(rooms()), ids=lambda x: getattr(x, "stem", x))
def test_a_module_imports_only_lower_layers(room, path):
    for name in imports(path):
        if name.startswith("textgen."):
            other = room_of(name.split(".")[1:])
            if other in LAYER and other != room:
                assert LAYER[other] < LAYER[room] or (room, other) in BESIDE, f"{room} imports {other}"


def test_only_the_rooms_that_should_know_a_library_do():
    for room, path in rooms():
        for name in imports(path):
            if name.startswith("flax.linen"):
                assert room == "models", f"{path.name} imports flax.linen"
            if name.startswith("ml_collections"):
                assert room in {"config", "run"}, f"{path.name} imports ml_collections"
            assert not name.startswith(("configs", "experiments", "tensorflow")), f"{path.name} imports {name}"
            if room in {"sampling", "generate", "decoders", "decoding", "speculative"}:
                assert not name.startswith("textgen.models"), f"{path.name} imports {name}"


def test_experiments_are_thin():
    of_the_benchmark = {"benchmark", "ours", "peers"}
    for path in (ROOT / "experiments").glob("*.py"):
        names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        assert path.stem in of_the_benchmark | {"__init__"} or names == {"main"}, f"{path.name} holds logic: {names}"
