"""The notebook runs from top to bottom: its code cells, one after the other, in one namespace."""

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "pico.ipynb"


def test_the_notebook_runs():
    names: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["answer"] and names["once"]
