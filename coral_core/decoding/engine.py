"""A target with the drafter and head that speed it up, and plain decoding, which is the same without them.

Axes: B batch of one, T position, M tree row, D hidden, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from coral_core.decoding import tree
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.policy.adaptive import AdaptiveTree
from coral_core.decoding.policy.constant import ConstantTree
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.policy.plan import ROOT_ONLY, Plan, TreeShape
from coral_core.decoding.recorded import Recorded
from coral_core.decoding.rounds import Clock, Round
from coral_core.decoding.sampling import Picker
from coral_core.decoding.seat import Memory
from coral_core.decoding.step import sit, step
from coral_core.decoding.tree import Draft
from coral_core.drafter.model import Drafter
from coral_core.errors import RecipeError
from coral_core.head.heads import Head
from coral_core.kernels.exact import MOST_NODES
from coral_core.target.target import Target


class Forwards(Protocol):
    """How the forwards of a round run: as they come (Eager), or recorded (recorded.py). Chosen once for an engine."""

    def capacity(self, committed: int, nodes: int) -> int:
        """Rows that the target's cache is made for: so many committed ones, and a tree of drafted nodes behind them."""
        ...

    def memory(self, target: Target) -> contextlib.AbstractContextManager[Memory]:
        """An empty memory for a single answer."""
        ...

    def drafting(self, drafter: Drafter, target: Target, head: Head, plan: Plan, memory: Memory) -> Drafting:
        """The drafting of one answer."""
        ...

    def verify(self, target: Target, memory: Memory, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        """The features [M,D] and logits [M,V] of a tree's rows, which the target's cache takes in."""
        ...


class Eager:
    """Forwards that run as they come."""

    def capacity(self, committed: int, nodes: int) -> int:
        return committed + nodes

    def memory(self, target: Target) -> contextlib.AbstractContextManager[Memory]:
        return contextlib.nullcontext(Memory(target))

    def drafting(self, drafter: Drafter, target: Target, head: Head, plan: Plan, memory: Memory) -> Drafting:
        return Drafting(drafter, target.lent, head, plan, memory.slots)

    def verify(self, target: Target, memory: Memory, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        cache = memory.cache
        mask = tree.mask(target, cache.length, draft.depth_M, draft.sees_MM)
        position_BM = (draft.depth_M + cache.length)[None]
        feature_MD = target.forward(draft.token_M[None], position_BT=position_BM, mask=mask, cache=cache)[0]
        return feature_MD, target.logits(feature_MD)


@dataclasses.dataclass(frozen=True)
class Engine:
    """What decodes. Without a drafter and a head, every round is a plain step.

    With the `costs` of its rounds on this device (measure.py), the tree is chosen within `shape`, round by round where
    no device must be waited for (policy/), and rounds whose draft would not pay are plain steps; without, every tree
    has that shape.
    """

    target: Target
    drafter: Drafter | None = None
    head: Head | None = None
    shape: TreeShape = ROOT_ONLY
    costs: Costs | None = None
    keeps_features: bool = False
    """Whether a seat's memory keeps the features of all rows where no drafter reads them."""
    forwards: Forwards = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """The target gives what this drafter reads of it.

        Raises RecipeError for a tree that is too large to be verified exactly.
        """
        if self.target.exact and self.shape.nodes > MOST_NODES:
            raise RecipeError(
                f"decode.draft_nodes is {self.shape.nodes}; on a CPU, forwards are exact with {MOST_NODES} at most. "
                f"Set decode.draft_nodes={MOST_NODES}, or decode.exact=false"
            )
        if self.drafter is not None:
            object.__setattr__(self, "target", self.target.tapping(self.drafter.config.taps))
        object.__setattr__(self, "forwards", Recorded() if self.target.graphs else Eager())

    def plan(self, seats: int = 1) -> Plan:
        """Who decides on the drafts of one answer, in rounds that so many answers share."""
        if self.costs is None:
            return self.shape
        if seats == 1 and self.target.device.type == "cpu":
            return AdaptiveTree(self.costs, self.shape, self.target.device)
        return ConstantTree(self.costs, self.shape, seats)

    def drafting(self, plan: Plan, memory: Memory) -> Drafting | None:
        """The drafting of one answer; None without a drafter."""
        if self.drafter is None or self.head is None:
            return None
        return self.forwards.drafting(self.drafter, self.target, self.head, plan, memory)

    def decode(
        self, prompt: list[int], sampler: Picker, max_new_tokens: int, memory: Memory | None = None
    ) -> Iterator[Round]:
        """Yield the answer a round at a time; the ids are exactly those of `plain`, the stop token included.

        With the `memory` of a dialogue, the part of the prompt that it holds is not forwarded again; one answer at a
        time may use it, and may be left after any round.
        Raises DataError for a prompt that is empty or does not fit the target's context, and where the target's numbers
        overflow.
        """
        clock = Clock()
        with contextlib.nullcontext(memory) if memory else self.forwards.memory(self.target) as held:
            seat, event = sit(self, held, prompt, sampler, max_new_tokens, clock)
            yield event
            while not seat.stop.done:
                yield from step(self, [seat], clock)
                if seat.error:
                    held.forget()
                    raise seat.error


def plain(
    target: Target, prompt: list[int], sampler: Picker, max_new_tokens: int, memory: Memory | None = None
) -> Iterator[Round]:
    """`Engine.decode` without drafts: one token per round. The baseline that a drafted answer races."""
    return Engine(target).decode(prompt, sampler, max_new_tokens, memory)
