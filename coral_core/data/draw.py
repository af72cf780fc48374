"""A fair sample of different dialogues from a source of any size, in flat memory.

A dialogue's key is a hash of the seed and of its words. Those with the smallest keys are the sample, in the order of
their keys: each is as likely as any other, whatever the order of the rows; and words said twice have one key, so that
they come once. In memory are 24 bytes for each dialogue wanted; their words wait in a nameless file.
(Bottom-k sampling: Cohen and Kaplan, "Summarizing data using bottom-k sketches", 2007.)
"""

import dataclasses
import hashlib
import itertools
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coral_core.data.kept import Kept
from coral_core.data.prompts import ROW_FIELDS, Dialogue, Skipped, UnusableError, parse
from coral_core.data.sources import MalformedError, Source
from coral_core.progress import Progress, silent

REPORT_ROWS = 2_000
"""Rows between two reports of progress."""
SPARE_KEYS = 4_096
"""Keys gathered beyond the sample before they are sorted again."""
SEEN_CHARACTERS = 20_000
"""Of a text, what its sanity is judged by."""
REPEATS = 25.0
"""A text that shrinks by more is one thing said over and over; prose and code shrink two- to sixfold."""
NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]")
"""Control characters, and what stands for bytes that could not be decoded."""
MALFORMED, MALFORMED_SHARE = 10, 0.01
"""So many rows may be malformed, and that share of all: with more, the file is not what it seems."""
NOISE = 0.01
"""The share of such characters above which a text was decoded wrongly, or is none."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is drawn from a source."""

    count: int
    """Different dialogues, at most."""
    seed: int
    """Decides which, and their order."""
    answered: bool
    """Keep the given answers, and skip dialogues without."""


def read_dialogues(
    source: Source, wanted: Wanted, *, skipped: Skipped, folder: Path, progress: Progress = silent
) -> Iterator[tuple[str, Dialogue]]:
    """Dialogues with their places.

    A file is read to its end, so that a sorted one gives a fair sample; a Hub stream is read until there are enough.
    `folder` is on the disk where words may wait. Repeated dialogues are counted among those that were drawn.
    """
    found = _usable(source.rows, wanted.answered, skipped, progress)
    draw = _Draw(Kept.nowhere(folder), wanted.count, skipped)
    for where, dialogue in found if source.ordered else itertools.islice(found, wanted.count):
        draw.offer(dialogue_key(dialogue, wanted.seed), where, dialogue)
    return draw.drawn()


def dialogue_key(dialogue: Dialogue, seed: int) -> int:
    """64 bits of a hash of the seed and the words."""
    digest = hashlib.blake2b(repr(dialogue).encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


class _Draw:
    """The `count` smallest different keys so far, and where their dialogues are kept."""

    def __init__(self, kept: Kept, count: int, skipped: Skipped) -> None:
        self.kept, self.count, self.skipped = kept, count, skipped
        self._bar = 1 << 64
        self._keys, self._numbers = array("Q"), array("q")

    def offer(self, key: int, where: str, dialogue: Dialogue) -> None:
        if key >= self._bar:
            return
        self._keys.append(key)
        self._numbers.append(len(self.kept))
        self.kept.append(dialogue, where)
        if len(self._keys) >= 2 * self.count + SPARE_KEYS:
            self._sort()

    def drawn(self) -> Iterator[tuple[str, Dialogue]]:
        self._sort()
        for number in self._numbers:
            row = self.kept.row(number)
            yield row["where"], parse(row, row["where"])

    def _sort(self) -> None:
        keys, numbers = (np.frombuffer(part, part.typecode) for part in (self._keys, self._numbers))
        different, first = np.unique(keys, return_index=True)
        if repeated := np.setdiff1d(numbers, numbers[first]).tolist():
            self.skipped.add("said before", self.kept.row(repeated[0])["where"], len(repeated))
        self._keys = array("Q", different[: self.count].tobytes())
        self._numbers = array("q", numbers[first][: self.count].tobytes())
        if len(self._keys) == self.count:
            self._bar = self._keys[-1] + 1  # a repetition of the last is counted too


def _usable(
    rows: Iterable[tuple[str, Any]], answered: bool, skipped: Skipped, progress: Progress
) -> Iterator[tuple[str, Dialogue]]:
    """Raises the first MalformedError when there are too many."""
    number = usable = malformed = 0
    first: MalformedError | None = None
    for number, (where, row) in enumerate(rows, start=1):
        if number % REPORT_ROWS == 0:
            progress("reading prompts", number, 0, {})
        try:
            dialogue = _sane(parse(row, where), answered)
        except UnusableError as reason:
            skipped.add(str(reason), where)
        except MalformedError as error:
            skipped.add(f"that {error.kind}", where)
            first, malformed = first or error, malformed + 1
            if malformed > MALFORMED + MALFORMED_SHARE * number:
                raise first from None
        else:
            usable += 1
            for name in ROW_FIELDS:
                if row.get(name):
                    skipped.leave_out(name, where)
            yield where, dialogue
    if first and malformed > usable:
        raise first
    progress("reading prompts", number, number, {})


def _sane(dialogue: Dialogue, answered: bool) -> Dialogue:
    """The dialogue, with its answers if they are kept. Raises UnusableError for one without, or nonsense."""
    if answered and not dialogue.answers:
        raise UnusableError("without an answer")
    if not answered:
        dialogue = dialogue.unanswered()
    for text in (*dialogue.users, *dialogue.answers):
        _refuse_nonsense(text[:SEEN_CHARACTERS])
    return dialogue


def _refuse_nonsense(text: str) -> None:
    """Raises UnusableError for what is text in no language."""
    if len(NO_TEXT.findall(text)) > NOISE * len(text):
        raise UnusableError("with text that was decoded wrongly (control or replacement characters)")
    if len(text) >= 500:
        raw = text.encode()
        if len(raw) > REPEATS * len(zlib.compress(raw, 1)):
            raise UnusableError("with a text that repeats itself over and over")
