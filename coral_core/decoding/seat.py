"""A seat: one sequence being answered, and all that its rounds go on from.

What a dialogue keeps between its answers is its `Memory`, so that the next prompt's history is not forwarded again. A
worked example, with the tokens a b c as the first prompt, answered by d e:

    ids  a b c d e      rows of the target  a b c d       the last token is known and not yet forwarded
    recall(a b c d x y) shares a b c d, keeps the rows a b c: a drafted row reads the token after its own

Forwarding one shared row again gives the feature that the drafter needs to go on from there.
Axes: T position, D hidden, M tree row.
"""

import dataclasses
from collections.abc import Hashable
from itertools import takewhile
from typing import Any

import torch

from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.policy.plan import Plan
from coral_core.decoding.sampling import Picker
from coral_core.decoding.tree import Draft
from coral_core.errors import DataError
from coral_core.target.target import Target


@dataclasses.dataclass
class Stop:
    """The one stopping rule: a stop token, which is kept, or the number of new tokens."""

    ids: frozenset[int]
    remaining: int

    def cut(self, new_ids: list[int]) -> list[int]:
        """The tokens to emit; afterwards `done` tells whether they are the last."""
        new_ids = new_ids[: self.remaining]
        for index, token in enumerate(new_ids):
            if token in self.ids:
                new_ids = new_ids[: index + 1]
                self.remaining = 0
                return new_ids
        self.remaining -= len(new_ids)
        return new_ids

    @property
    def done(self) -> bool:
        """Whether nothing more may be emitted."""
        return self.remaining == 0


class History:
    """Prompt and answer on the device, appended to in place."""

    def __init__(self, prompt_T: torch.Tensor, capacity: int) -> None:
        self._token_T = prompt_T.new_empty(capacity)
        self._length = 0
        self.extend(prompt_T)

    def extend(self, token_T: torch.Tensor) -> None:
        """Append committed tokens."""
        end = self._length + token_T.numel()
        self._token_T[self._length : end] = token_T
        self._length = end

    def row(self) -> torch.Tensor:
        """[1,T]: the past of the next token."""
        return self._token_T[None, : self._length]

    def rows(self, draft: Draft) -> torch.Tensor:
        """[M,T]: the past of each node's pick, which is all that is committed and the node's own branch.

        The branch's tokens stand in the columns of their rows; the others repeat the root, which is every node's
        ancestor, so that a row holds no token that is not in its past.
        """
        token_M = draft.token_M.clamp_min(0)  # of rows that only fill up, nobody reads the pick
        branch_MM = torch.where(draft.sees_MM, token_M, token_M[0])
        return torch.cat((self.row().expand(branch_MM.shape[0], -1), branch_MM), dim=1)


class Unread:
    """Committed rows that the drafter has not read: a feature [T,D] each, and the token behind it.

    They are kept in pieces until the drafter is asked: to join them in every round without it took 4 to 13 ms behind
    2,048 to 8,192 rows of SmolLM2-135M.
    """

    def __init__(self) -> None:
        self._first = 0
        self._pieces: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def end(self) -> int:
        """The position behind the last row."""
        return self._first + sum(token_T.numel() for token_T, _ in self._pieces)

    def restart(self, first: int, token_T: torch.Tensor, feature_TD: torch.Tensor) -> None:
        """All before position `first` has been read."""
        self._first, self._pieces = first, [(token_T, feature_TD)]

    def add(self, token_T: torch.Tensor, feature_TD: torch.Tensor) -> None:
        """More rows."""
        self._pieces.append((token_T, feature_TD))

    def join(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens [T] and the features [T,D] of all rows, of which there must be one at least."""
        if len(self._pieces) > 1:
            tokens, features = zip(*self._pieces, strict=True)
            self._pieces = [(torch.cat(tokens), torch.cat(features))]
        return self._pieces[0]

    def cut(self, first: int, end: int) -> None:
        """Keep the rows of the positions from `first` to before `end`."""
        kept = slice(first - self._first, end - self._first)
        if first < end:
            token_T, feature_TD = self.join()
            self._pieces = [(token_T[kept], feature_TD[kept])]
        else:
            self._pieces = []
        self._first = first


class Memory:
    """The caches of one dialogue, and the tokens they hold. Answers are the same with and without it, in float32.

    `ids` is set when a round is whole, and only rows of `ids[:-1]` are ever used again: an answer that is stopped
    anywhere, by Ctrl-C in the middle of a layer too, leaves a memory that can go on.
    """

    def __init__(self, target: Target, cache: SlotCache | None = None, slots: Slots | SlotCache | None = None) -> None:
        """With caches of its own, unless seats of shared ones are given."""
        self.ids: list[int] = []
        layers = target.model.config.get_text_config().num_hidden_layers
        self.cache = cache or SlotCache(layers, 0)
        self.slots = slots or Slots(0)
        """The drafter's rows; they lag behind after plain answers, and after rounds that did not draft."""
        self.unread = Unread()
        self.recordings: dict[Hashable, Any] = {}
        """Forwards that were recorded over these caches, if any are (recorded.py)."""

    def recall(self, prompt: list[int], capacity: int, draft_rows: int | None = None) -> int:
        """Keep the rows that `prompt` shares with what was said, forget the others, make room for `capacity`.

        With `draft_rows`, the rows that a growing draft takes on top, the drafter will go on too: only rows are kept
        that it also has, or whose features wait for it. Returns how many are, always fewer than the prompt has.
        """
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, self.ids, strict=False)))
        kept = max(0, shared - 1)
        if draft_rows is not None:
            kept = min(kept, self.unread.end)
            self.slots.reserve(capacity + draft_rows)
        self.ids = prompt[: kept + 1]
        self.slots.truncate(min(kept, self.slots.length))
        self.unread.cut(self.slots.length, min(kept, self.unread.end))
        self.cache.truncate(kept)
        self.cache.reserve(capacity)
        return kept

    def forget(self) -> None:
        """Nothing was said; the storage stays."""
        self.ids = []
        self.cache.truncate(0)
        self.slots.truncate(0)
        self.unread.cut(0, 0)


@dataclasses.dataclass(eq=False)
class Seat:
    """One sequence being answered. `step` (step.py) moves it on by a round."""

    memory: Memory
    """The tokens so far, the last of them not forwarded yet, and the rows of both caches."""
    sampler: Picker
    stop: Stop
    history: History | None
    """The tokens on the device, for a sampler that looks back."""
    plans: dict[int, Plan]
    """Who decides how much is drafted, by the number of answers that share a round."""
    drafting: Drafting | None
    """None where nothing is ever drafted."""
    root_1: torch.Tensor
    """The last token, and the root of the next tree."""
    error: DataError | None = None
    """Why the answer ended before its time."""

    @property
    def rows(self) -> int:
        """Rows of the target's cache."""
        return self.memory.cache.length

    def past(self) -> torch.Tensor | None:
        """[1,T]: what the sampler looks back at, if it does."""
        return self.history.row() if self.history else None
