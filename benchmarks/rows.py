"""Rows that a benchmark keeps while it runs: a file with a JSON object a line, which a kill may cut off."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Add a row, on a line of its own also behind one that was cut off."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        whole = file.read() in (b"", b"\n")
        file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")


def read(path: Path) -> Iterator[Row]:
    """The rows that are there; a last line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
