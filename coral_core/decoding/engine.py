"""A target with the drafter and head that speed it up, and plain decoding, which is the same without them."""

import dataclasses
from collections.abc import Iterator

from coral_core.decoding import replayed
from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.drafting import ROOT_ONLY, Drafting, TreeShape
from coral_core.decoding.graphs import padded_rows
from coral_core.decoding.memory import Memory, borrowed
from coral_core.decoding.policy.adaptive import Paying, Plan
from coral_core.decoding.policy.constant import Steady
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.rounds import Clock, Round
from coral_core.decoding.sampling import Picker
from coral_core.decoding.step import sit, step
from coral_core.drafter.model import Drafter
from coral_core.head.candidates import Head
from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True)
class Engine:
    """What decodes. Without a drafter and a head, every round is a plain step.

    With the `costs` of its rounds on this device (measure.py), the tree is chosen within `shape`, round by round where
    that makes nobody wait (policy/), and rounds whose draft would not pay are plain steps; without, every tree has
    that shape.
    """

    target: Target
    drafter: Drafter | None = None
    head: Head | None = None
    shape: TreeShape = ROOT_ONLY
    costs: Costs | None = None

    def __post_init__(self) -> None:
        """The target gives what this drafter reads of it."""
        if self.drafter is not None:
            object.__setattr__(self, "target", self.target.tapping(self.drafter.config.taps))

    @property
    def rows(self) -> int:
        """Rows that a round takes of the target's cache, besides those that it keeps."""
        return padded_rows(self.shape.nodes + 1) if self.target.graphs else self.shape.nodes

    def plan(self, company: int = 1) -> Plan:
        """Who decides on the drafts of one answer, in rounds that so many answers share."""
        if self.costs is None:
            return self.shape
        if company == 1 and self.target.device.type == "cpu":
            return Paying(self.costs, self.shape, self.target.device)
        return Steady(self.costs, self.shape, company)

    def drafting(self, plan: Plan, slots: Slots | SlotCache) -> Drafting | None:
        """The drafting of one answer; None without a drafter."""
        if self.drafter is None or self.head is None:
            return None
        return replayed.drafting(self.drafter, self.target.lent, self.head, plan, slots)

    def decode(
        self, prompt: list[int], sampler: Picker, max_new_tokens: int, memory: Memory | None = None
    ) -> Iterator[Round]:
        """Yield the answer a round at a time; the ids are exactly those of `plain`, the stop token included.

        With the `memory` of a dialogue, the part of the prompt that it holds is not forwarded again; one answer at a
        time may use it, and may be left after any round.
        Raises DataError for a prompt that is empty or does not fit the target's context.
        """
        clock = Clock()
        with borrowed(self.target, memory) as held:
            seat, event = sit(self, held, prompt, sampler, max_new_tokens, clock)
            yield event
            while not seat.stop.done:
                yield from step(self, [seat], clock)


def plain(
    target: Target, prompt: list[int], sampler: Picker, max_new_tokens: int, memory: Memory | None = None
) -> Iterator[Round]:
    """`Engine.decode` without drafts: one token per round. The baseline that a drafted answer races."""
    return Engine(target).decode(prompt, sampler, max_new_tokens, memory)
