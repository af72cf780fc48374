"""Rows of prompts from a file or the Hub, one at a time, each with the place to name when it is wrong.

Not for making sense of a row: prompts.py does that.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from coral_core.errors import DataError

LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".text")
SUFFIXES = (*LINES, ".json", ".parquet", *TEXT)
SHUFFLE_ROWS = 10_000
"""Rows of a Hub stream that are shuffled at once: its order is only known by reading it all."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows, each with its place ("prompts.jsonl line 7")."""

    rows: Iterable[tuple[str, Any]]
    ordered: bool
    """Whether the order is the file's own, so that a sample must be drawn from the whole of it."""


def open_source(name: str, seed: int) -> Source:
    """A local file by its suffix (.gz of one too), or a Hub dataset: `owner/name`, `owner/name:split` or
    `owner/name:configuration:split`.

    Raises DataError for a file that is absent or of no known kind, and while iterating for a row that cannot be read.
    """
    path = find_file(name)
    if path is None:
        return Source(_hub(name, seed), ordered=False)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".parquet":
        return Source(_parquet(path), ordered=True)
    if suffix in TEXT:
        return Source(((where, {"prompt": text}) for where, text in _lines(path)), ordered=True)
    if suffix in (*LINES, ".json"):
        return Source(_json_list(path) if _begins_a_list(path) else _json_lines(path), ordered=True)
    raise DataError(f"data.prompts is {name}; its name must end in one of {', '.join(SUFFIXES)} (or that and .gz)")


def find_file(name: str) -> Path | None:
    """The file that `data.prompts` names, or None for a Hub dataset. Raises DataError for a file that is not there."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"data.prompts is the folder {path}; give one file in it")
    plain = path.name.removesuffix(".gz")
    if path.is_absolute() or name.startswith((".", "~")) or plain.endswith(SUFFIXES) or name.count("/") != 1:
        raise DataError(f"no prompt file {path}. Set data.prompts to self, a file, or a Hub dataset id (owner/name)")
    return None


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Non-blank lines with their places. Raises DataError for an empty file, or a line that is not text."""
    number, empty = 0, True
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    empty = False
                    yield f"{path} line {number}", text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number} is not UTF-8 ({error.reason}). Convert the file first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} beyond line {number}: {error}. Restore the file") from error
    if empty:
        raise DataError(f"{path} is empty. Put one dialogue on each line")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, text in _lines(path):
        try:
            yield where, json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}. Mend or remove the line") from error


def _begins_a_list(path: Path) -> bool:
    """Whether a .json file is one list; else it holds one object a line, under whatever name."""
    if path.name.removesuffix(".gz").endswith(LINES):
        return False
    return next(_lines(path))[1].startswith("[")


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with _open(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except ValueError as error:  # a JSONDecodeError names its line
        raise DataError(f"{path} is not JSON: {error}. Mend that line") from error
    if not rows:
        raise DataError(f"{path} is an empty list. Put one dialogue in each item")
    yield from ((f"{path} item {number}", row) for number, row in enumerate(rows, start=1))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for table in file.iter_batches(batch_size=1024):
            for row in table.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read {path} beyond row {number}: {reason}. Restore the file") from error
    if not number:
        raise DataError(f"{path} is empty. Put one dialogue in each row")


def _hub(name: str, seed: int) -> Iterator[tuple[str, Any]]:
    """A stream, shuffled within a window by the seed; nothing is downloaded beyond what is read."""
    import datasets

    dataset, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    configuration = rest[0] if len(rest) > 1 else None
    number = 0
    try:
        stream = datasets.load_dataset(dataset, configuration, split=split, streaming=True)
        for row in stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS):
            number += 1
            yield f"{name} row {number}", row
    except Exception as error:  # the Hub client raises many kinds; the reason is passed on
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"cannot read the Hub dataset {name}, split {split}: {type(error).__name__}: {reason}. "
            "Check the id (owner/name:split), or download it and set data.prompts to the file"
        ) from error
    if not number:
        raise DataError(f"the Hub dataset {name}, split {split}, is empty. Set data.prompts to owner/name:split")
