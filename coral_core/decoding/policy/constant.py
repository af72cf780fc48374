"""One tree for all drafts of an answer, where it cannot be chosen round by round: in a batch, and on a GPU.

There, to look at the drafter's confidence is to wait for the device on every level, and a recorded draft (recorded.py)
has one shape.
Axes: N row: a node, best first.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.policy.trials import Trials
from coral_core.decoding.tree import Draft, Verdict


def best_shape(bounds: TreeShape, costs: Costs, seats: int) -> TreeShape:
    """The tree within `bounds` that is best for a drafter as they usually are, for so many answers side by side.

    A path goes on with probability 0.75 per level, and each doubling of the nodes adds 0.65 accepted drafts: EAGLE-2's
    trees of 8 to 60 nodes, and pico's.
    """
    cost = round_cost(bounds, costs, seats)

    def tokens_per_step(size: tuple[int, int]) -> float:
        depth, nodes = size
        drafts = min(3 * (1 - 0.75**depth), 0.65 * math.log2(1 + nodes))
        return (1 + drafts) / cost(depth, nodes)

    sizes = [(depth, nodes) for depth in range(1, bounds.depth + 1) for nodes in range(1, bounds.nodes + 1)]
    depth, nodes = max(sizes, key=tokens_per_step)
    return dataclasses.replace(bounds, depth=depth, nodes=nodes)


def round_cost(bounds: TreeShape, costs: Costs, seats: int) -> Callable[[int, int], float]:
    """What a round with a tree of such depth and so many nodes costs in plain steps, the rows of all seats included."""
    verify, level = costs.verified(seats * (bounds.nodes + 1)), costs.expanded(seats * bounds.topk)[-1]
    return lambda depth, nodes: costs.base + (depth - 1) * level + verify[seats * (nodes + 1) - 1]


class ConstantTree:
    """The plan of one answer: the same tree in every round that drafts, and plain steps where that does not pay."""

    shift, copying = 0.0, None

    def __init__(self, costs: Costs, bounds: TreeShape, seats: int = 1) -> None:
        self.shape = best_shape(bounds, costs, seats)
        self.depth, self.topk = self.shape.depth, self.shape.topk
        plain = costs.verified(seats)[seats - 1]
        self.cost = round_cost(bounds, costs, seats)(self.shape.depth, self.shape.nodes) / plain
        """Of a drafted round, in plain steps."""
        self.trials = Trials()

    def drafts(self) -> bool:
        return self.trials.drafts()

    def width(self, score_N: torch.Tensor) -> int:
        return self.shape.width(score_N)

    def count(self, score_N: torch.Tensor) -> int:
        return self.shape.count(score_N)

    def learn(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing is asked of the device."""
        self.trials.learn(verdict.accepted_drafts + 1, self.cost)
