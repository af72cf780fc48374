"""How large the house is: code lines, modules, what one must read to follow a round, recipe keys.

    python -m benchmarks.house                    # this checkout
    python -m benchmarks.house CHECKOUT ...       # others, such as a git worktree of an older commit

A code line is a line that is neither blank, nor a comment, nor part of a docstring; lines are told by room too, because
features came while the house was rebuilt. An arrow is an import between two modules of `decoding/`; a floor is a step
of the longest chain of them.

What one reads to follow a round is counted in three ways. `round_runs` are the modules whose code runs in one round of
pico that drafts, by the recipe's defaults: a trace, which no arrangement of imports can shorten. `round_modules` are
those that the round's first module imports, directly or not, at import or in a function. The class methods that read
and write folders (LOADERS, in transformers' words) are left out there: they import the loading when they are called,
and no round calls them. `round_modules_with_loading` is the same with them, and is what was counted before.
"""

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("coral_core", "coral_cli")
ROUND = ("step", "engine")
"""Where a round begins: the first of these modules that there is."""
LOADERS = {"from_pretrained", "save_pretrained", "push_to_hub"}
"""Methods that no round calls."""
TRACE = """
import json, sys
from pathlib import Path
import coral_core
from coral_core import Drafter, Generator, Target
root, found = Path(coral_core.__file__).parent, set()

def note(frame, event, argument):
    path = Path(frame.f_code.co_filename)
    if event == "call" and root in path.parents and frame.f_code.co_name not in ("<module>", "rounds"):
        found.add(".".join(path.relative_to(root.parent).with_suffix("").parts))

rounds = Generator(Target.from_pretrained("pico"), Drafter.from_pretrained("pico")).rounds("What is a reef?", seed=0)
while True:
    found.clear()
    sys.setprofile(note)
    event = next(rounds)
    sys.setprofile(None)
    if event.kind == "draft" and event.accepted_drafts:
        break
print(json.dumps(sorted(found)))
"""
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        for child in getattr(node, "body", None) or [] if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                docstrings.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for token in tokens if token.type not in SILENT for line in range(token.start[0], token.end[0] + 1)}
    return lines - docstrings


def functions(text: str) -> list[tuple[int, str]]:
    """(lines, name) of every function, its docstring included."""
    found = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [((node.end_lineno or node.lineno) - node.lineno + 1, node.name) for node in found]


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(text: str, known: set[str], without: frozenset[str] = frozenset()) -> set[str]:
    """The known modules that a file imports at run time, in functions too, but for those named in `without`.

    What is imported for type checkers alone does not count.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in without:
            node.body = []
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


def closure(start: str, arrows: dict[str, set[str]]) -> set[str]:
    """Everything that is reached from `start`, itself included."""
    reached, pending = {start}, [start]
    while pending:
        new = arrows[pending.pop()] - reached
        reached |= new
        pending += new
    return reached


def runs(root: Path) -> list[str]:
    """The modules whose code runs in a round of pico that drafts."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", TRACE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=root)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def floors(arrows: dict[str, set[str]]) -> int:
    """Modules in the longest chain of imports."""

    @cache
    def height(name: str) -> int:
        return 1 + max(map(height, arrows[name] - {name}), default=0)

    return max(map(height, arrows), default=0)


def count(root: Path) -> dict[str, Any]:
    """The numbers of one checkout."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    texts = {module_name(path, root): path.read_text(encoding="utf-8") for path in paths}
    texts = {name: text for name, text in texts.items() if text.strip()}
    known = set(texts)
    arrows = {name: imports(text, known) - {name} for name, text in texts.items()}
    room = {name: to for name, to in arrows.items() if name.startswith("coral_core.decoding.")}
    inside = {name: to & set(room) for name, to in room.items()}
    start = next(f"coral_core.decoding.{name}" for name in ROUND if f"coral_core.decoding.{name}" in known)
    followed = {name: imports(text, known, frozenset(LOADERS)) - {name} for name, text in texts.items()}
    every, with_loading, ran = closure(start, followed), closure(start, arrows), runs(root)
    lines = {name: len(code_lines(text)) for name, text in texts.items()}
    longest = max(found for text in texts.values() for found in functions(text))
    return {
        "code_lines": sum(lines.values()),
        "modules": len(texts),
        "round_runs": len(ran),
        "round_modules": len(every),
        "round_modules_with_loading": len(with_loading),
        "round_modules_of_decoding": len(every & set(room)),
        "decoding_modules": len(room),
        "decoding_arrows": sum(map(len, inside.values())),
        "decoding_floors": floors(inside),
        "longest_function": {"lines": longest[0], "name": longest[1]},
        "recipe_keys": recipe_keys(texts["coral_core.recipe.schema"]),
        "runs": ran,
        "lines_by_room": by_room(lines),
    }


def by_room(lines: dict[str, int]) -> dict[str, int]:
    """Code lines of each room of the core, and of the command line."""
    found: dict[str, int] = {}
    for name, count in lines.items():
        package, _, rest = name.partition(".")
        room = rest.split(".")[0] if package == "coral_core" and rest else package
        found[room] = found.get(room, 0) + count
    return found


def recipe_keys(schema: str) -> int:
    """Annotated fields of the schema's dataclasses that are no sections themselves."""
    classes = [node for node in ast.parse(schema).body if isinstance(node, ast.ClassDef)]
    fields = [field for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    sections = {node.name for node in classes}
    return sum(ast.unparse(field.annotation) not in sections for field in fields)


def main() -> None:
    checkouts = [Path(text) for text in sys.argv[1:]] or [ROOT]
    print(json.dumps({str(root): count(root.resolve()) for root in checkouts}, indent=1))


if __name__ == "__main__":
    main()
