"""Who decides how large a draft is: what a round asks, and the simplest answer, a tree of one size.

Axes: N row: a node, best first.
"""

import dataclasses
from collections.abc import Hashable
from typing import ClassVar, Protocol

import torch

from coral_core.decoding.policy.copying import Copying
from coral_core.decoding.tree import Draft, Verdict


class Plan(Protocol):
    """Who decides on the size of a draft: TreeShape, AdaptiveTree (adaptive.py) or ConstantTree (constant.py)."""

    @property
    def topk(self) -> int:
        """Nodes expanded per level at most, and children each proposes."""
        ...

    @property
    def depth(self) -> int:
        """Levels at most."""
        ...

    @property
    def shift(self) -> float:
        """What is added to each conditional log-probability."""
        ...

    @property
    def shape(self) -> Hashable | None:
        """What says how large every draft is; None where their size depends on scores."""
        ...

    @property
    def copying(self) -> Copying | None:
        """The copies that may take a draft's place; None where every draft is the drafter's."""
        ...

    def drafts(self) -> bool:
        """Whether the next round drafts; asked once per round that does not copy."""
        ...

    def width(self, score_N: torch.Tensor) -> int:
        """How many of the newest level's nodes are expanded."""
        ...

    def count(self, score_N: torch.Tensor) -> int:
        """How many of all candidates are verified."""
        ...

    def learn(self, draft: Draft, verdict: Verdict) -> None:
        """What came of a drafted round."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeShape:
    """How large a draft is: true numbers of levels, nodes, and nodes expanded per level.

    As a plan, every draft is this large; where a tree is chosen by what it costs, these are its bounds.
    """

    depth: int
    nodes: int
    topk: int
    copying: ClassVar[None] = None

    @property
    def rows(self) -> int:
        """Rows of the drafter's cache that a growing draft takes, at most."""
        return self.depth * self.topk

    @property
    def shift(self) -> float:
        return 0.0

    @property
    def shape(self) -> "TreeShape":
        return self

    def drafts(self) -> bool:
        return self.nodes > 0

    def width(self, score_N: torch.Tensor) -> int:
        return score_N.numel()

    def count(self, score_N: torch.Tensor) -> int:
        return min(self.nodes, score_N.numel())

    def learn(self, draft: Draft, verdict: Verdict) -> None:
        """A fixed tree learns nothing."""


ROOT_ONLY = TreeShape(depth=0, nodes=0, topk=0)
"""The plan of plain decoding."""
