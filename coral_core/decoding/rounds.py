"""What both decoders share: the event they yield, the rule that stops them, the prefill.

Axes: B batch, T position, D hidden, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

import torch

from coral_core.decoding import masks
from coral_core.decoding.cache import SlotCache
from coral_core.errors import DataError
from coral_core.target.target import Target

PREFILL_ROWS = 1024
"""Prompt rows of one forward pass: a long prompt must not spike memory."""


@dataclasses.dataclass(frozen=True)
class Round:
    """New tokens, and how they came."""

    new_ids: list[int]
    kind: Literal["prefill", "plain", "draft"]
    """plain: a step of plain decoding, in a drafted answer too, where a draft would not pay."""
    accepted_drafts: int = 0
    """Of `new_ids`, how many were drafted; the others are the target's own."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall-clock by phase."""


class Clock:
    """Splits a round's wall-clock into phases; `lap` closes one.

    prefill; draft (the drafter's layer), head (its LM head), verify (the target's forward and logits), accept (picks,
    and the rows that are kept), other (trees, masks, lists: Python). On a GPU the work of one phase may end in a later
    one, as nothing waits for the device in between, and a recorded draft is `draft` as a whole.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def restart(self) -> None:
        """What was done since the last lap belongs to nobody: the caller had the round."""
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """The phases so far; starts anew."""
        seconds, self.seconds = self.seconds, {}
        return seconds


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


def room(target: Target, prompt: Sequence[int], max_new_tokens: int) -> int:
    """New tokens that fit the target's context.

    Raises DataError when the prompt alone fills it, is empty, or has a token that the target does not know.
    """
    if not prompt:
        raise DataError("the prompt has no tokens; give at least one")
    if len(prompt) >= target.max_positions:
        where = ", as far as its rotary factors stay the same" if target.bounded else ""
        raise DataError(
            f"the prompt has {len(prompt)} tokens and the target's context holds {target.max_positions}{where}; "
            "shorten the prompt"
        )
    target.refuse_strange(prompt)
    return min(max_new_tokens, target.max_positions - len(prompt))


@torch.no_grad()
def prefill(target: Target, ids_T: torch.Tensor, cache: SlotCache) -> torch.Tensor:
    """Append the rows not yet in the cache, in chunks; their features [T,D]."""
    features = []
    while cache.length < ids_T.numel():
        past = cache.length
        chunk_BT = ids_T[past : past + PREFILL_ROWS][None]
        new = chunk_BT.shape[1]
        position_BT = torch.arange(past, past + new, device=ids_T.device)[None]
        mask = masks.for_rows(target, past, new)
        features.append(target.forward(chunk_BT, position_BT=position_BT, mask=mask, cache=cache)[0])
    return torch.cat(features)
