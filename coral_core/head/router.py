"""The router: from the drafter's hidden state to a probability per group of head rows (CORAL, arXiv 2502.16880).

Axes: N row, D hidden, G group.
"""

import torch
from torch import nn

from coral_core.kernels.linear import PackedLinear


class Router(nn.Module):
    """softmax(W2 h); with `inner`, the paper's softmax(W2(act(W1 h) + h)).

    One linear layer is the default: W1 is as large as the head rows that a 32,000-token head reads at 1/8, and on pico
    it kept no more of the target's tokens (LOG.md).
    """

    def __init__(self, hidden: int, groups: int, *, inner: bool = False) -> None:
        super().__init__()
        self.w1 = PackedLinear(hidden, hidden) if inner else None
        self.w2 = PackedLinear(hidden, groups)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N,G]; their softmax is the expected probability mass of each group."""
        if self.w1 is not None:
            hidden_ND = nn.functional.silu(self.w1(hidden_ND)) + hidden_ND
        logits_NG: torch.Tensor = self.w2(hidden_ND)
        return logits_NG
