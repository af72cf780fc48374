"""One tree for all drafts of an answer, where it cannot be chosen round by round: in a batch, and on a GPU.

There, to look at the drafter's confidence is to wait for the device on every level, and a recorded draft (replayed.py)
has one shape.
"""

import dataclasses
import math

import torch

from coral_core.decoding.costs import Costs
from coral_core.decoding.drafting import TreeShape
from coral_core.decoding.tree import Draft
from coral_core.decoding.trials import Trials
from coral_core.decoding.verify import Verdict


def fixed(bounds: TreeShape, costs: Costs, seats: int) -> TreeShape:
    """The tree within `bounds` that is best for a drafter as they usually are, for so many answers side by side.

    A path goes on with probability 0.75 per level, and each doubling of the nodes adds 0.65 accepted drafts: EAGLE-2's
    trees of 8 to 60 nodes, and pico's. Rows of all seats are paid for together.
    """

    def pays(tree: TreeShape) -> float:
        drafts = min(3 * (1 - 0.75**tree.depth), 0.65 * math.log2(1 + tree.nodes))
        return (1 + drafts) / spent(tree, costs, seats)

    depths, nodes = range(1, bounds.depth + 1), range(1, bounds.nodes + 1)
    return max((dataclasses.replace(bounds, depth=d, nodes=n) for d in depths for n in nodes), key=pays)


def spent(tree: TreeShape, costs: Costs, seats: int = 1) -> float:
    """What a round with this tree costs, in plain steps."""
    level = costs.expanded(seats * tree.topk)[-1]
    return costs.base + (tree.depth - 1) * level + costs.verified(seats * (tree.nodes + 1) - 1)[-1]


class Steady:
    """The plan of one answer: the same tree in every round that drafts, and plain steps where that does not pay."""

    shift = 0.0

    def __init__(self, costs: Costs, bounds: TreeShape) -> None:
        self.tree = fixed(bounds, costs, 1)
        self.depth, self.topk, self.shape = self.tree.depth, self.tree.topk, self.tree.shape
        self.spent = spent(self.tree, costs)
        self.trials = Trials()

    def drafts(self) -> bool:
        return self.trials.drafts()

    def width(self, score_N: torch.Tensor) -> int:
        return self.tree.width(score_N)

    def count(self, score_N: torch.Tensor) -> int:
        return self.tree.count(score_N)

    def learn(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing is asked of the device."""
        self.trials.learn(verdict.accepted_drafts + 1, self.spent)
