"""What one dialogue keeps between its answers, so that the next prompt's history is not forwarded again.

A worked example, with the tokens a b c as the first prompt, answered by d e:

    ids  a b c d e      rows of the target  a b c d       the last token is known and not yet forwarded
    recall(a b c d x y) shares a b c d, keeps the rows a b c: a drafted row reads the token after its own

Forwarding one shared row again gives the feature that the drafter needs to go on from there.
"""

import contextlib
from collections.abc import Iterator
from itertools import takewhile

from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.graphs import Graphs, columns
from coral_core.target.target import Target


class Memory:
    """The caches of one dialogue, and the tokens they hold. Answers are the same with and without it, in float32.

    `ids` is set when a round is whole, and only rows of `ids[:-1]` are ever used again: an answer that is stopped
    anywhere, by Ctrl-C in the middle of a layer too, leaves a memory that can go on.
    """

    def __init__(self, target: Target, cache: SlotCache | None = None, slots: Slots | SlotCache | None = None) -> None:
        """With caches of its own, unless seats of shared ones are given."""
        self.ids: list[int] = []
        layers = target.model.config.get_text_config().num_hidden_layers
        self.cache = cache or SlotCache(layers, 0, Graphs() if target.graphs else None)
        self.slots = slots or Slots(0, Graphs() if target.graphs else None)
        """The drafter's rows; they lag behind after plain answers."""

    def recall(self, prompt: list[int], capacity: int, draft_rows: int | None = None) -> int:
        """Keep the rows that `prompt` shares with what was said, forget the others, make room for `capacity`.

        With `draft_rows`, the rows that a growing draft takes on top, the drafter will go on too: only rows that it
        also has are kept. Returns how many are, always fewer than the prompt has.
        """
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, self.ids, strict=False)))
        kept = max(0, shared - 1)
        if self.cache.graphs is not None:
            capacity = columns(capacity)  # recordings are lost when the storage grows
        if draft_rows is not None:
            kept = min(kept, self.slots.length)
            self.slots.reserve(capacity + draft_rows)
        self.ids = prompt[: kept + 1]
        self.slots.truncate(min(kept, self.slots.length))
        self.cache.truncate(kept)
        self.cache.reserve(capacity)
        return kept

    def forget(self) -> None:
        """Nothing was said; the storage stays."""
        self.ids = []
        self.cache.truncate(0)
        self.slots.truncate(0)


@contextlib.contextmanager
def borrowed(target: Target, memory: Memory | None) -> Iterator[Memory]:
    """The given memory, or an empty one for a single answer.

    Where forwards are recorded, the target keeps the latter for the next answer: recordings are tied to their storage.
    """
    if memory is not None or not target.graphs:
        yield memory or Memory(target)
        return
    memory = target.idle.pop() if target.idle else Memory(target)
    try:
        yield memory
    finally:
        memory.forget()
        target.idle.append(memory)
