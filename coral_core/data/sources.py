"""Rows of prompts from a file or the Hub, one at a time, each with the place to name when it is wrong.

Not for making sense of a row: prompts.py does that.
"""

import codecs
import contextlib
import dataclasses
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from coral_core import hub
from coral_core.errors import DataError, first_line

SELF = "self"
"""The name of the source that is the target itself."""
LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".text")
SUFFIXES = (*LINES, ".json", ".parquet", *TEXT)
PIECE = 1 << 20
"""Characters of a JSON list read at once."""
ITEM_CHARACTERS = 1 << 26
"""A longer item of a JSON list is taken for a slip in the file: else all of it would be read for the other end."""
BETWEEN = re.compile(r"[\s,]*")
SHUFFLE_ROWS = 10_000
"""Rows of a Hub stream that are shuffled at once: its order is only known by reading it all."""


class MalformedError(DataError):
    """A row that is not what it should be. Others may be: such rows are counted, by `kind`, up to a limit."""

    def __init__(self, where: str, kind: str, detail: str = "", mend: str = "Mend or remove it") -> None:
        super().__init__(f"{where} {kind}{detail}. {mend}")
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows, each with its place ("prompts.jsonl line 7"); in the place of one that cannot be read, why."""

    rows: Iterable[tuple[str, Any]]
    ordered: bool
    """Whether the order is the file's own, so that a sample must be drawn from the whole of it."""


@dataclasses.dataclass(frozen=True)
class Share:
    """One of the sources that `data.prompts` names, and its share of the dialogues."""

    name: str
    weight: float


def shares(prompts: str) -> list[Share]:
    """`self`, a file or a Hub dataset, or several of them with weights: `chats.jsonl=3, owner/name=1, self=1`.

    A name without a weight has 1. Raises DataError for a weight that is none, and a name given twice.
    """
    if Path(prompts).expanduser().is_file():  # its name may hold a comma
        return [Share(prompts, 1.0)]
    found = [_share(part.strip(), prompts) for part in prompts.split(",")]
    names = [share.name for share in found]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise DataError(f"data.prompts is '{prompts}', where {twice} stands twice. Add its weights up")
    return found


def _share(text: str, prompts: str) -> Share:
    name, equals, weight = text.rpartition("=")
    if not equals:
        name, weight = text, "1"
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not name.strip() or not 0 < number < float("inf"):
        raise DataError(
            f"data.prompts is '{prompts}', where '{text}' names no source with a weight above 0. "
            "Write it as chats.jsonl=3, owner/name=1"
        )
    return Share(name.strip(), number)


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
        return Source(_plain_lines(path), ordered=True)
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
        raise DataError(
            f"no prompt file {path}{_near_file(path)} "
            "Set data.prompts to self, a file, or a Hub dataset id (owner/name)"
        )
    return None


def _near_file(path: Path) -> str:
    """'; did you mean data.prompts=…?' when a prompt file of nearly that name lies beside it; else a full stop."""
    stems = {file: file.name.split(".")[0] for file in sorted(path.parent.glob("*")) if _ends_as_prompts(file.name)}
    near = difflib.get_close_matches(path.name.split(".")[0], stems.values(), n=1)
    return next((f"; did you mean data.prompts={file}?" for file, stem in stems.items() if stem in near), ".")


def _ends_as_prompts(name: str) -> bool:
    return name.removesuffix(".gz").endswith(SUFFIXES)


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[str, str | MalformedError]]:
    """Non-blank lines with their places. Raises DataError for an empty file."""
    number, empty = 0, True
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path} line {number}"
                text = _decoded(line, where, "utf-8-sig" if number == 1 else "utf-8")
                if text:
                    empty = False
                    yield where, text
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} beyond line {number}: {error}. Restore the file") from error
    if empty:
        raise DataError(f"{path} is empty. Put one dialogue on each line")


def _decoded(line: bytes, where: str, encoding: str) -> str | MalformedError:
    try:
        return line.decode(encoding).strip()
    except UnicodeDecodeError as error:
        return MalformedError(where, "is not UTF-8", f" ({error.reason})", "Convert the file first")


def _plain_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, text in _lines(path):
        yield where, {"prompt": text} if isinstance(text, str) else text


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for where, text in _lines(path):
        yield where, _loaded(text, where) if isinstance(text, str) else text


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return MalformedError(where, "is not JSON", f": {error}")


def _begins_a_list(path: Path) -> bool:
    """Whether a .json file is one list; else it holds one object a line, under whatever name."""
    if path.name.removesuffix(".gz").endswith(LINES):
        return False
    with contextlib.suppress(OSError, EOFError, zlib.error), _open(path) as file:  # they are told when it is read
        return file.read(PIECE).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return False


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of one list, never more than a few of them in memory."""
    number = 0
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig") as file:
            for number, row in enumerate(_items(file), start=1):
                yield f"{path} item {number}", row
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg}, line {error.lineno}, item {number + 1}. Mend it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} item {number + 1} is not UTF-8 ({error.reason}). Convert the file first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} beyond item {number}: {error}. Restore the file") from error
    if not number:
        raise DataError(f"{path} is an empty list. Put one dialogue in each item")


def _items(file: IO[str]) -> Iterator[Any]:
    """Raises JSONDecodeError, its line counted from the file's first."""
    decoder, line = json.JSONDecoder(), 1
    text = file.read(PIECE)
    at = text.index("[") + 1
    while True:
        at = cast("re.Match[str]", BETWEEN.match(text, at)).end()
        if text[at : at + 1] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # perhaps only since the item goes on
            more = file.read(max(PIECE, len(text) - at)) if len(text) - at < ITEM_CHARACTERS else ""
            if not more:
                error.lineno += line - 1
                raise
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
        else:
            yield row


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
        raise DataError(f"cannot read {path} beyond row {number}: {first_line(error)}. Restore the file") from error
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
        with hub.offline_where_absent():  # else it is tried for minutes
            stream = datasets.load_dataset(dataset, configuration, split=split, streaming=True)
        for row in stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS):
            number += 1
            yield f"{name} row {number}", row
    except Exception as error:  # the Hub client raises many kinds; the reason is passed on
        raise DataError(
            f"cannot read the Hub dataset {name}, split {split}: {type(error).__name__}: {first_line(error)}. "
            f"Check the id (owner/name:split), or download it and set data.prompts to the file{hub.login(error)}"
        ) from error
    if not number:
        raise DataError(f"the Hub dataset {name}, split {split}, is empty. Set data.prompts to owner/name:split")
