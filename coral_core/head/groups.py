"""Groups of the vocabulary: which token is which row of the grouped head.

Groups are balanced (sizes differ by one at most), and the head's rows are permuted so that each group is one contiguous
block: an active group is then a slice, not a gather. How rows find their group is grouping/clustering.py.
Axes: G group, R place in a list: a row of its group, V vocabulary.
"""

import dataclasses

import torch

from coral_core.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Groups:
    """The permutation, drawn for six tokens in four groups; -1 fills the rows that a smaller group lacks:

    token_GR = [[4, 0],      order_V  = [4, 0, 2, 5, 1, 3]
                [2, 5],      start_G  = [0, 2, 4, 5, 6] (one more than groups)
                [1, -1],     group_V  = [0, 2, 1, 3, 0, 1] (by token)
                [3, -1]]
    """

    token_GR: torch.Tensor

    @classmethod
    def from_order(cls, order_V: torch.Tensor, groups: int) -> "Groups":
        """Cut a permutation of the vocabulary into `groups` balanced blocks, the larger ones first.

        Raises RecipeError when there are more groups than tokens.
        """
        vocabulary = order_V.numel()
        check_groups(groups, vocabulary)
        size_G = balanced_sizes(vocabulary, groups)
        width = int(size_G[0])
        token_GR = torch.full((groups, width), -1, dtype=torch.int64)
        token_GR[torch.arange(width) < size_G[:, None]] = order_V.to("cpu", torch.int64)
        return cls(token_GR)

    @property
    def count(self) -> int:
        """Groups."""
        return self.token_GR.shape[0]

    @property
    def order_V(self) -> torch.Tensor:
        """Token ids in the order of the permuted head's rows."""
        return self.token_GR[self.token_GR >= 0]

    @property
    def start_G(self) -> list[int]:
        """First permuted row of each group, and the vocabulary's size at the end."""
        return [0, *(self.token_GR >= 0).sum(1).cumsum(0).tolist()]

    @property
    def group_V(self) -> torch.Tensor:
        """The group of each token id."""
        group_GR = torch.arange(self.count)[:, None].expand_as(self.token_GR)
        present_GR = self.token_GR >= 0
        group_V = torch.empty(int(present_GR.sum()), dtype=torch.int64)
        group_V[self.token_GR[present_GR]] = group_GR[present_GR]
        return group_V

    def is_whole(self, vocabulary: int) -> bool:
        """Whether every token of a vocabulary is in exactly one group, and shorter groups are filled at their end."""
        size_G = (self.token_GR >= 0).sum(1)
        filled_at_end = bool(((self.token_GR >= 0) == (torch.arange(self.token_GR.shape[1]) < size_G[:, None])).all())
        order_V = self.order_V
        everyone = order_V.numel() == vocabulary and torch.equal(order_V.sort().values, torch.arange(vocabulary))
        return filled_at_end and everyone


def check_groups(groups: int, vocabulary: int) -> None:
    """Raises RecipeError when some group would have no token."""
    if groups > vocabulary:
        raise RecipeError(f"head.groups is {groups}, but the vocabulary has {vocabulary} tokens; it must be fewer")


def balanced_sizes(vocabulary: int, groups: int) -> torch.Tensor:
    """Rows of each group [G]: 6 tokens in 4 groups are 2, 2, 1, 1."""
    size_G = torch.full((groups,), vocabulary // groups)
    size_G[: vocabulary % groups] += 1
    return size_G
