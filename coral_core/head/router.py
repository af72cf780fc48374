"""The router: from the drafter's hidden state to a probability per group of head rows (CORAL, arXiv 2502.16880).

Axes: N row, D hidden, G group.
"""

import torch
from torch import nn


class Router(nn.Module):
    """softmax(W2(act(W1 h) + h))."""

    def __init__(self, hidden: int, groups: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, hidden)
        self.w2 = nn.Linear(hidden, groups)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N,G]; their softmax is the expected probability mass of each group."""
        return self.w2(nn.functional.silu(self.w1(hidden_ND)) + hidden_ND)
