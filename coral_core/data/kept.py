"""Dialogues in a file, by number: what stays in memory is where each begins, eight bytes."""

import json
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from coral_core.data.prompts import Dialogue, parse


class Kept:
    """Rows of a JSONL file that `parse` reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._starts: array[int] = array("q")

    @classmethod
    def nowhere(cls, folder: Path) -> "Kept":
        """None yet, in a file of that disk which has no name and is gone with the process."""
        return cls(tempfile.TemporaryFile(dir=folder))

    @classmethod
    def load(cls, path: Path) -> "Kept":
        """Those that `save` wrote."""
        kept, start = cls(path.open("rb")), 0
        for line in kept._file:
            kept._starts.append(start)
            start += len(line)
        return kept

    def save(self, path: Path) -> None:
        """Write the file whole, or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        self._file.seek(0)
        with temporary.open("wb") as copy:
            shutil.copyfileobj(self._file, copy)
        temporary.replace(path)

    def append(self, dialogue: Dialogue, where: str = "") -> None:
        """Add one, with the place it was found at if that is to be known."""
        row = dialogue.to_row() | ({"where": where} if where else {})
        self._starts.append(self._file.seek(0, 2))
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def row(self, number: int) -> dict[str, Any]:
        """One row as it stands in the file; `where` is the place given with it."""
        self._file.seek(self._starts[number])
        return cast("dict[str, Any]", json.loads(self._file.readline()))

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Dialogue]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Dialogue:
        return parse(self.row(number), f"dialogue {number}")
