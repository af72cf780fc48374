"""One table of axis letters, in CONTRIBUTING.md: legends say what it says, and tensors' names keep to their legend."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"(?<!\w)_*[a-z]\w*_([A-Z\d]*[A-Z][A-Z\d]*)\b")
"""A tensor's name; a digit in its ending is an axis of that length."""
OWN = re.compile(rf"(?:(?<=self\.)|(?<!\.)){NAME.pattern}")
"""Likewise, but no field of something that another module made."""
SHAPE = re.compile(r"\[((?:\d?[A-Z]|\d)(?:, ?(?:\d?[A-Z]|\d|\.\.\.))*)\]")
"""[B,T,D], as docstrings write it."""


def table() -> dict[str, str]:
    """What each letter means."""
    rows = re.findall(r"^\| ([A-Z]) \| \*\*(.+?)\*\*", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == len({letter for letter, _ in rows}) == len({meaning for _, meaning in rows}) > 10
    return dict(rows)


def legend(source: str) -> dict[str, str]:
    """What a module says of its letters: "Axes: B batch, T position." at the end of a sentence of its docstring."""
    found = re.search(r"Axes: (.*?)\.(?:\s|$)", ast.get_docstring(ast.parse(source)) or "", re.DOTALL)
    parts = re.split(r"[,;] (?=[A-Z] )", " ".join(found[1].split())) if found else []
    return {letter: meaning for letter, meaning in (part.split(" ", 1) for part in parts)}


def is_prose(node: ast.AST) -> bool:
    """A docstring, or what stands in the place of one below a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def complaints(source: str, letters: dict[str, str], *, must_explain: bool = True) -> list[str]:
    """What is wrong with a module's legend and names. Without `must_explain` a module may do without a legend."""
    said = legend(source)
    prose = [node.value.value for node in ast.walk(ast.parse(source)) if is_prose(node)]
    shapes = [shape for text in prose for shape in SHAPE.findall(text)]
    used, seen = (
        {letter for name in [*kind.findall(source), *shapes] for letter in name if letter.isalpha()}
        for kind in (OWN, NAME)
    )
    explained = said if said or must_explain else letters
    return [
        *(f"{letter} is not in the table" for letter in sorted(said.keys() - letters)),
        *(
            f"{letter} is {letters[letter]}, not {meaning}"
            for letter, meaning in said.items()
            if letter in letters and not re.match(re.escape(letters[letter]) + r"\b", meaning)
        ),
        *(f"{letter} is used and not explained" for letter in sorted(used - explained.keys())),
        *(f"{letter} is explained and not used" for letter in sorted(said.keys() - seen)),
    ]


@pytest.mark.parametrize("folder", ["coral_core", "coral_cli", "benchmarks", "recipes", "tests"])
def test_every_module_keeps_to_the_table(folder):
    letters = table()
    wrong = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for what in complaints(path.read_text(), letters, must_explain=folder != "tests")
        if path != Path(__file__)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("docstring", "wrong"),
    [
        ("Axes: B batch, T position.", []),
        ("Axes: B batch of\none, T position in a prompt, its first too. More words, D said nowhere.", []),
        ("Axes: B beam, T position.", ["B is batch, not beam"]),
        ("Axes: B batches, T position.", ["B is batch, not batches"]),
        ("Axes: B batch, T position, Z depth.", ["Z is not in the table", "Z is explained and not used"]),
        ("Axes: B batch, T position, D hidden.", ["D is explained and not used"]),
        ("Axes: B batch.", ["T is used and not explained"]),
        ("No legend.", ["B is used and not explained", "T is used and not explained"]),
    ],
)
def test_a_strange_legend_is_found(docstring, wrong):
    letters = {"B": "batch", "T": "position", "D": "hidden"}
    assert complaints(f'"""Text.\n{docstring}\n"""\nids_BT1 = 1\n', letters) == wrong
    assert complaints("ids_BX = 1", letters, must_explain=False) == ["X is used and not explained"]


def test_shapes_in_docstrings_are_read_too():
    source = '''"""Axes: B batch."""\ndef f(ids_B):\n    """To each [B,1,T]."""\n'''
    assert complaints(source, {"B": "batch", "T": "position"}) == ["T is used and not explained"]


def test_only_fields_made_elsewhere_need_no_legend():
    found = complaints("self.ids_B, batch.ids_T = 1, 2", {"B": "batch", "T": "position"})
    assert found == ["B is used and not explained"]
