"""A seat: one sequence being answered, and all that its rounds go on from.

Axes: T position, D hidden.
"""

import dataclasses

import torch

from coral_core.decoding.drafting import Drafting
from coral_core.decoding.history import History
from coral_core.decoding.memory import Memory
from coral_core.decoding.policy.adaptive import Plan
from coral_core.decoding.rounds import Stop
from coral_core.decoding.sampling import Picker


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
    token_T: torch.Tensor
    """The tokens that the drafter has not read yet; the last one is the root of the next tree."""
    feature_TD: torch.Tensor
    """The target's features before these tokens."""

    @property
    def rows(self) -> int:
        """Rows of the target's cache."""
        return self.memory.cache.length

    def past(self) -> torch.Tensor | None:
        """[1,L]: what the sampler looks back at, if it does."""
        return self.history.row() if self.history else None
