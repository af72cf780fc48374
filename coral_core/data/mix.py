"""Several sources as one: from each its share of the dialogues that turn out to be of use."""

import dataclasses
from collections.abc import Iterator

from coral_core.data.draw import dialogue_key
from coral_core.data.prompts import Dialogue, Skipped
from coral_core.data.sources import Share


@dataclasses.dataclass
class Stream:
    """One source's dialogues with their places, and how many of them were taken."""

    share: Share
    found: Iterator[tuple[str, Dialogue]]
    taken: int = 0


class Mix:
    """Dialogues of all the streams; `take` says that the last one is of use.

    The next comes from the stream that is furthest behind its share. What is of no use does not count, so that a
    source with many dialogues that are too long keeps its share all the same; when one has ended, the others go on.
    """

    def __init__(self, streams: list[Stream], seed: int, skipped: Skipped) -> None:
        self._live, self._seed, self._skipped = list(streams), seed, skipped
        self._last: Stream | None = None
        self._taken: set[int] = set()
        self._several = len(streams) > 1

    def __iter__(self) -> Iterator[tuple[str, Dialogue]]:
        while self._live:
            self._last = min(self._live, key=lambda stream: (stream.taken + 1) / stream.share.weight)
            found = next(self._last.found, None)
            if found is None:
                self._live.remove(self._last)
            elif self._several and not self._new(found[1]):
                self._skipped.add("said before", found[0])
            else:
                yield found

    def take(self) -> None:
        """Count the last one for its source."""
        assert self._last is not None
        self._last.taken += 1

    def _new(self, dialogue: Dialogue) -> bool:
        """A stream does not repeat itself, but two of them may say the same."""
        key = dialogue_key(dialogue, self._seed)
        known = key in self._taken
        self._taken.add(key)
        return not known
