"""One mean drafted round with the full head, measured by decoding: what the grouped head's cost model starts from.

Plain steps and copies of the text in between are no rounds of the head's.

Axes: N row, D hidden, C candidate token.
"""

import copy
import dataclasses

import torch

from coral_core.decoding.rounds import Round
from coral_core.drafter.model import Drafter
from coral_core.errors import DataError
from coral_core.grouping.cost import RoundCost, hit_rates
from coral_core.head.heads import Candidates, FullHead, Head
from coral_core.lent import Lent
from coral_core.progress import Progress
from coral_core.recipe.schema import Recipe
from coral_core.run import sampler, wire
from coral_core.target.target import Target

PROMPTS = 12
"""Held-out prompts decoded."""


class Watched:
    """A head, and what each call of it had and gave."""

    recordable = False  # a replayed draft would not come by here

    def __init__(self, head: Head) -> None:
        self.head = head
        self.rows: list[int] = []
        """Drafted rows."""
        self.tokens: list[torch.Tensor] = []
        """Candidates, as the head gave them: ids in any arrangement."""

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """The head's own."""
        found = self.head.candidates(hidden_ND)
        self.rows.append(hidden_ND.shape[0])
        self.tokens.append(found.token_C)
        return found


@dataclasses.dataclass(frozen=True)
class Probe:
    """The target on its device, and prompts to decode."""

    recipe: Recipe
    target: Target
    prompts: list[list[int]]
    progress: Progress

    @property
    def lent(self) -> Lent:
        """The head as it will be read: on the target's device, in its dtype."""
        return self.target.lent

    def measure(self, drafter: Drafter, head: Head | None = None) -> RoundCost:
        """Decode with a head, the full one unless given. Raises DataError when no prompt led to a drafted round."""
        drafter = copy.deepcopy(drafter).to(self.target.device, self.target.dtype)
        watched = Watched(head or FullHead(self.lent))
        engine = wire(self.target, drafter, watched, self.recipe.decode)
        limit = self.recipe.decode.max_new_tokens
        rounds: list[Round] = []
        for number, prompt in enumerate((self.prompts[0], *self.prompts[:PROMPTS])):  # the first warms up
            decoded = [event for event in engine.decode(prompt, sampler(self.recipe), limit) if event.kind == "draft"]
            if number == 0:
                watched.rows.clear()
            else:
                rounds += decoded
            self.progress("rounds with the full head", number, min(PROMPTS, len(self.prompts)), {})
        if not rounds:
            raise DataError("no held-out prompt led to a drafted round. Raise data.holdout or decode.max_new_tokens")
        later = sorted(rows for rows in watched.rows if rows > 1) or [1]
        return RoundCost(
            hit_rates=hit_rates([event.accepted_drafts for event in rounds]),
            round_s=sum(sum(event.seconds.values()) for event in rounds) / len(rounds),
            head_s=sum(event.seconds.get("head", 0.0) for event in rounds) / len(rounds),
            head_calls=len(watched.rows) / len(rounds),
            level_rows=later[len(later) // 2],
        )
