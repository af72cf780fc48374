"""Who may import whom: the room table, read from the syntax tree of every file, lazy imports included."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("coral_core", "coral_cli") for path in (ROOT / package).rglob("*.py"))

NOUNS = {
    "errors",
    "embedded",
    "progress",
    "recipe",
    "lock",
    "artifacts",
    "hub",
    "processes",
    "tensors",
    "kernels",
    "lent",
}
"""What any room may import; the last five need more than PyYAML, so the rooms without torch may not."""

MAY_IMPORT = {
    "__init__": {"api", "drafter", "target"},  # the three names of the package, when they are first asked for
    "errors": set(),
    "embedded": set(),
    "progress": set(),
    "hub": set(),
    "lock": {"errors"},
    "processes": set(),
    "tensors": set(),
    "kernels": {"errors", "lent"},
    "lent": {"errors", "tensors", "kernels"},
    "recipe": {"errors", "embedded", "artifacts"},
    "artifacts": {"errors", "embedded", "lock", "progress"},
    "target": NOUNS,
    "store": NOUNS,
    "drafter": NOUNS,
    "head": NOUNS,
    "data": NOUNS | {"target", "store", "decoding"},
    "inspection": NOUNS | {"store"},
    "training": NOUNS | {"store", "drafter", "head"},
    "grouping": NOUNS | {"store", "drafter", "head", "training"},
    "decoding": NOUNS | {"target", "drafter", "head"},
    "run": NOUNS | {"decoding", "target", "drafter", "head"},
    "api": NOUNS | {"run", "decoding", "target", "drafter", "head"},
    "report": {"errors"},
    "bench": NOUNS | {"run", "api", "decoding", "target", "drafter", "grouping", "head", "report"},
    "serve": NOUNS | {"api", "decoding", "target"},
    "export": NOUNS | {"target", "drafter", "head", "report"},
}
"""Of a room's own files nothing is said: they import each other freely."""

WITHOUT_TORCH = {"errors", "embedded", "progress", "recipe", "artifacts", "report"}
"""Rooms of the standard library, and PyYAML."""

CLI_AT_IMPORT = {"errors", "embedded", "progress", "recipe", "artifacts"}
"""What the command line may import before a command runs; the rest inside command bodies, so that --help is quick."""

DISTRIBUTION = {"yaml": "pyyaml", "sklearn": "scikit-learn"}
"""Where a package's name is not that of the module."""
BROUGHT = {
    "anyio": "starlette",
    "huggingface_hub": "transformers",
    "markdown_it": "rich",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
    "triton": "torch",
}
"""Packages that one of ours brings, and whose versions are its own matter."""

HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "sklearn"}


def imported(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every dotted module (or name in one) that a tree imports, however deep in it, with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((f"{source}.{alias.name}", node) for alias in node.names)


def rooms(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The rooms of coral_core that a tree imports; `from coral_core import __version__` is none."""
    for name, node in imported(tree):
        parts = name.split(".")
        if parts[0] == "coral_core" and len(parts) > 1 and parts[1] != "__version__":
            yield parts[1], node


def runs_at_import(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: not bodies of functions, nor `if TYPE_CHECKING:`."""
    pending: list[ast.stmt] = list(module.body)
    while pending:
        statement = pending.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        pending += [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]


def anywhere(tree: ast.Module, package: str, room: str) -> Iterator[tuple[str, ast.AST]]:
    """What no file of either package may do."""
    for name, node in imported(tree):
        top = name.split(".")[0]
        if not top:
            yield f"relative import {name}", node
        elif top == "coral_cli" and package != "coral_cli":
            yield "nobody imports coral_cli", node
        elif room in WITHOUT_TORCH and top not in sys.stdlib_module_names | {"coral_core", "yaml"}:
            yield f"{room} imports {top}", node


def in_core(tree: ast.Module, room: str) -> Iterator[tuple[str, ast.AST]]:
    """The room table; no print, no reading of the environment."""
    for other, node in rooms(tree):
        if other != room and other not in MAY_IMPORT.get(room, set()):
            yield f"{room} imports {other}", node
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield "print in core", node
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield "the environment read in core", node


def in_cli(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Nothing heavy before a command runs."""
    for statement in runs_at_import(tree):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            heavy = [other for other, _ in rooms(statement) if other not in CLI_AT_IMPORT]
            heavy += [name for name, _ in imported(statement) if name.split(".")[0] in HEAVY]
            yield from ((f"coral_cli imports {name} before a command runs", statement) for name in heavy)


def violations(path: Path, text: str) -> list[str]:
    """What a file does against the table, one line each. `path` is relative to the root."""
    tree = ast.parse(text)
    package, room = path.parts[0], path.parts[1].removesuffix(".py")
    own = in_core(tree, room) if package == "coral_core" else in_cli(tree)
    found = [*anywhere(tree, package, room), *own]
    return [f"{path}:{getattr(node, 'lineno', 1)}: {what}" for what, node in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_to_the_table(path):
    assert violations(path.relative_to(ROOT), path.read_text(encoding="utf-8")) == []


def test_every_room_is_in_the_table():
    """A new room begins with a line in the table."""
    found = {
        path.relative_to(ROOT / "coral_core").parts[0].removesuffix(".py")
        for path in FILES
        if "coral_core" in str(path)
    }
    assert found - {"pico"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_packages_do_no_work_at_import(path):
    """One convenient import in an __init__ makes every other import of the package pay for it."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    if path.parent.name != "coral_core":
        assert all(isinstance(statement, ast.Expr) for statement in statements)
        return
    imports = [
        node
        for node in runs_at_import(ast.parse(path.read_text(encoding="utf-8")))
        if "import" in type(node).__name__.lower()
    ]
    assert [ast.unparse(node) for node in imports] == ["from typing import TYPE_CHECKING"]


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("coral_core/store/x.py", "from coral_core.target.load import Target", "store imports target"),
        ("coral_core/store/x.py", "def f():\n    from coral_core.target import load", "x.py:2: store imports target"),
        ("coral_core/store/x.py", "def f():\n    import coral_core.target.load", "store imports target"),
        ("coral_core/store/x.py", "from coral_core import target", "store imports target"),
        (
            "coral_core/decoding/x.py",
            "if TYPE_CHECKING:\n    from coral_core.store.store import Store",
            "imports store",
        ),
        ("coral_core/head/x.py", "from coral_core.drafter.model import Drafter", "head imports drafter"),
        ("coral_core/recipe/x.py", "def f():\n    import torch", "recipe imports torch"),
        ("coral_core/recipe/x.py", "from coral_core.lent import Lent", "recipe imports lent"),
        ("coral_core/artifacts.py", "import numpy as np", "artifacts imports numpy"),
        ("coral_core/data/x.py", "from . import y", "relative import"),
        ("coral_core/data/x.py", "from ..store import y", "relative import"),
        ("coral_core/data/x.py", "from coral_cli.console import err", "nobody imports coral_cli"),
        ("coral_core/data/x.py", "print('hello')", "print in core"),
        ("coral_core/data/x.py", "x = os.environ['HOME']", "the environment read in core"),
        ("coral_core/data/x.py", "x = os.getenv('HOME')", "the environment read in core"),
        ("coral_core/newroom/x.py", "import coral_core.errors", "newroom imports errors"),
        ("coral_cli/commands/x.py", "from coral_core.training.loop import train", "before a command runs"),
        ("coral_cli/commands/x.py", "try:\n    import torch\nexcept ImportError:\n    pass", "imports torch before"),
    ],
)
def test_the_check_sees_each_kind_of_trespass(path, text, message):
    assert message in " ".join(violations(Path(path), text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("coral_core/bench/x.py", "def f():\n    from coral_core.decoding.engine import speculative"),
        ("coral_core/recipe/x.py", "import yaml, dataclasses\nfrom coral_core.errors import RecipeError"),
        ("coral_core/artifacts.py", "from coral_core import __version__"),
        ("coral_cli/commands/x.py", "def f():\n    from coral_core.training.loop import train\n    import torch"),
        ("coral_cli/commands/x.py", "if TYPE_CHECKING:\n    from coral_core.training.loop import train"),
    ],
)
def test_the_check_lets_the_rest_pass(path, text):
    assert violations(Path(path), text) == []


def test_every_package_that_is_imported_is_asked_for():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = set(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=', text)) | BROUGHT.keys()
    found = {name.split(".")[0] for path in FILES for name, _ in imported(ast.parse(path.read_text(encoding="utf-8")))}
    other = {DISTRIBUTION.get(name, name) for name in found - sys.stdlib_module_names - {"coral_core", "coral_cli"}}
    assert other <= asked, sorted(other - asked)
