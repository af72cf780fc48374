"""The tree that pays: how deep, how wide and how large a draft is, round by round, and whether there is one at all.

A round of E expected tokens that costs C plain steps is worth E - rate · C, where `rate` is the tokens that drafted
rounds bring per plain step: the most tokens per second come from making each round worth as much as can be
(Dinkelbach's rule for a ratio). E is 1 + Σ over verified nodes of the probability that their path is accepted. So

    a level is drafted with its w best nodes when    hit_rate · Σ p  >  rate · (level(w) + w more rows verified)
    n nodes are verified for the largest             Σ p  -  rate · verify(n)

and where drafted rounds bring less than one token per plain step, rounds are plain steps; now and then a draft is
tried again. Probabilities are the drafter's own, each conditional one multiplied with `calibration`: accepted over
expected at the nodes that were reached. Nothing here reads a clock, and nothing outlives an answer: an answer's rounds
are a function of its tokens and of the costs.
Axes: N row: a node, best first, or a number of them, M tree row.
"""

import math

import torch

from coral_core.decoding.policy.copying import Copying
from coral_core.decoding.policy.costs import Costs
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.policy.trials import FORGET, Trials
from coral_core.decoding.tree import Draft, Verdict

CALIBRATION, HIT_RATE, TRIES = 0.85, 0.7, 4.0
"""The calibration and the hit rate before the first draft, and the number of reached nodes that they weigh.

pico, trees of 48 nodes in 8 levels, accepted over expected: 0.85 at temperature 0 and 0.98 at 1, about the same at
every depth and for every probability.
"""
LEAST_CALIBRATION, MOST_CALIBRATION = 0.02, 1.25
"""Bounds of the calibration."""


def best_prefix(gain_N: torch.Tensor, cost_N: torch.Tensor) -> int:
    """How many of the gains to take, in their order: the n with the largest sum of n gains less cost_N[n], n from 0.

    The first such n on a tie. Costs may rise in any way: every prefix is looked at.
    """
    worth_N = gain_N.new_zeros(gain_N.numel() + 1)
    torch.cumsum(gain_N, 0, out=worth_N[1:])
    return int((worth_N - cost_N).argmax())


class AdaptiveTree:
    """The plan of one answer, with a tree of its own for every round."""

    shape = None

    def __init__(self, costs: Costs, bounds: TreeShape, device: torch.device) -> None:
        self.bounds = bounds
        self.topk, self.depth = bounds.topk, bounds.depth
        self.base = costs.base
        self.verify, self.level = costs.verified(bounds.nodes + bounds.topk), costs.expanded(bounds.topk)
        self.verify_N = torch.tensor(self.verify, device=device)
        self.level_N = torch.tensor(self.level, device=device)
        self.hits, self.expected, self.tries = TRIES * HIT_RATE, TRIES * HIT_RATE / CALIBRATION, TRIES
        self.trials = Trials()
        self.copying = Copying(self.trials, self.verify[: bounds.nodes + 1])
        self._begin()

    def _begin(self) -> None:
        """A new draft: nothing spent, no node expanded."""
        self.drafting, self.expanded = self.base, 0

    @property
    def calibration(self) -> float:
        """Accepted over expected: what the drafter's probabilities are worth."""
        return min(MOST_CALIBRATION, max(LEAST_CALIBRATION, self.hits / self.expected))

    @property
    def hit_rate(self) -> float:
        """How often a reached node with children has the right one among them."""
        return self.hits / self.tries

    @property
    def shift(self) -> float:
        return math.log(self.calibration)

    def drafts(self) -> bool:
        drafts = self.trials.drafts()
        if drafts:
            self._begin()
        return drafts

    def width(self, score_N: torch.Tensor) -> int:
        """None in a small trial: a first token that is right says enough, and costs little when it is wrong."""
        if self.trials.small:
            return 0
        first, wide = min(self.expanded, self.bounds.nodes), score_N.numel()
        cost_N = self.level_N[: wide + 1] + self.verify_N[first : first + wide + 1] - self.verify[first]
        width = best_prefix(score_N.exp() * self.hit_rate, cost_N * self.trials.rate)
        self.expanded += width
        self.drafting += self.level[width]
        return width

    def count(self, score_N: torch.Tensor) -> int:
        """One node at least, if it can be right at all: without a trial nothing would be learnt."""
        probable_N = score_N[: self.bounds.nodes].exp()
        count = best_prefix(probable_N, self.verify_N[: probable_N.numel() + 1] * self.trials.rate)
        return count or int(probable_N[0] > 0)

    def learn(self, draft: Draft, verdict: Verdict) -> None:
        """Weigh what was accepted against what was expected at the nodes that were reached, and against its cost."""
        accepted, nodes = verdict.accepted_drafts, draft.token_M.numel() - 1
        parent_N = draft.parent_M[1:]
        reached_M = torch.zeros_like(draft.sees_MM[0]).index_fill_(0, verdict.path_A, True)
        chance_N = (draft.score_M[1:] - draft.score_M[parent_N]).exp() * reached_M[parent_N]
        failed_N = (parent_N == verdict.path_A[-1]).to(chance_N.dtype)
        expected, failed = torch.stack((chance_N.sum(), failed_N.sum())).tolist()
        calibration = self.calibration
        self.hits = FORGET * self.hits + accepted
        self.expected = FORGET * self.expected + expected / calibration
        self.tries = FORGET * self.tries + accepted + (failed > 0)
        self.trials.learn(accepted + 1, self.drafting + self.verify[nodes])
