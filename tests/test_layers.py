"""Imports run one way through the package, read from the source of every module, wherever in it they stand."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "gradkeel"

# A module imports modules of its own layer and of earlier ones. `gradkeel` is the package's own `__init__`.
LAYERS = (
    "version",
    "errors",
    "language",
    "norms",
    "outcome",
    "tensors",
    "kernels",
    "policies",
    "selection",
    "measure",
    "ranks",
    "apply",
    "guard",
    "noise_scale",
    "accumulate",
    "functional",
    "table",
    "record",
    "page",
    "explain",
    "attaching",
    "smoothness",
    "gradkeel",
    "doctor",
    "compare",
    "bench",
    "integrations",
    "cli",
    "__main__",
)
ONLY = {"policies": {"errors", "norms"}}
PLACEMENT = "tensors.py"
LONGEST = 400


def sources(package):
    return sorted(path for path in package.rglob("*.py") if path.stat().st_size)


def layer_of(path, package):
    """The layer of a file: its first folder, or its own name, or `gradkeel` for the package's `__init__`."""
    first = path.relative_to(package).parts[0].removesuffix(".py")
    return "gradkeel" if first == "__init__" else first


def imported_modules(path, package):
    """The dotted names, from the package's down, of all that a file imports; names inside modules included."""
    here = ("gradkeel", *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_layers(path, package):
    """The layers that a file imports from, its own left out."""
    own = {module.stem for module in package.iterdir()} | {"gradkeel"}
    for name in imported_modules(path, package):
        top, *rest = name.split(".")
        if top == "gradkeel":
            layer = rest[0] if rest and rest[0] in own else "gradkeel"
            if layer != layer_of(path, package):
                yield layer


def upward_imports(package):
    """Each import that runs up the list, or out of what `ONLY` allows, as a line to read."""
    for path in sources(package):
        layer = layer_of(path, package)
        allowed = ONLY.get(layer, set(LAYERS[: LAYERS.index(layer)]))
        for imported in imported_layers(path, package):
            if imported not in allowed:
                yield f"{path.relative_to(package)} imports {imported}"


def names_in(tree):
    """Every name, attribute and imported module that a tree speaks of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", None) or ""


def speaks_of_dtensor(path):
    names = names_in(ast.parse(path.read_text(encoding="utf-8")))
    return any(
        name == "DTensor" or name.startswith(("torch.distributed.tensor", "torch.distributed._tensor"))
        for name in names
    )


def test_every_module_has_a_layer():
    assert {layer_of(path, PACKAGE) for path in sources(PACKAGE)} <= set(LAYERS)


def test_imports_run_down_the_layers():
    assert list(upward_imports(PACKAGE)) == []


def test_sharded_tensors_are_known_in_one_place():
    assert [
        str(path.relative_to(PACKAGE))
        for path in sources(PACKAGE)
        if speaks_of_dtensor(path) and path != PACKAGE / PLACEMENT
    ] == []


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(PACKAGE)}
    assert {str(path): length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize(
    ("file", "line", "finding"),
    [
        ("norms.py", "import gradkeel.guard", "norms.py imports guard"),
        ("norms.py", "from gradkeel.guard import Guard", "norms.py imports guard"),
        ("norms.py", "from gradkeel import guard", "norms.py imports guard"),
        ("norms.py", "from gradkeel import Guard", "norms.py imports gradkeel"),
        ("norms.py", "from . import guard", "norms.py imports guard"),
        ("norms.py", "from .guard import Guard", "norms.py imports guard"),
        ("policies/base.py", "from ..guard import Guard", "policies/base.py imports guard"),
        ("policies/base.py", "from gradkeel.step_report import X", "policies/base.py imports step_report"),
        ("norms.py", "def f():\n    from gradkeel.guard import Guard", "norms.py imports guard"),
        ("norms.py", "if TYPE_CHECKING:\n    import gradkeel.guard as g", "norms.py imports guard"),
        ("__init__.py", "def __getattr__(name):\n    from gradkeel import cli", "__init__.py imports cli"),
        ("guard.py", "from gradkeel.norms import Decision", None),
        (
            "policies/bounds/fixed.py",
            "from .base import Policy\nfrom gradkeel.errors import PolicySpecError",
            None,
        ),
        ("guard.py", "import torch.errors\nfrom cli import main", None),
    ],
)
def test_the_reader_of_imports_finds_each_way_to_import(tmp_path, file, line, finding):
    for name in ("errors.py", "norms.py", "step_report.py", "guard.py", "cli.py", "policies/base.py", file):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / file).write_text(line, encoding="utf-8")
    assert list(upward_imports(tmp_path)) == ([finding] if finding else [])


@pytest.mark.parametrize(
    "line",
    [
        "from torch.distributed.tensor import Shard",
        "import torch.distributed.tensor",
        "isinstance(x, t.DTensor)",
    ],
)
def test_the_reader_of_names_finds_each_way_to_ask(tmp_path, line):
    (tmp_path / "guard.py").write_text(line, encoding="utf-8")
    assert speaks_of_dtensor(tmp_path / "guard.py")
