"""The full head: every row of the vocabulary, the reference for all others.

Axes: N row, D hidden, V vocabulary.
"""

import torch

from coral_core.head.candidates import Candidates
from coral_core.lent import Lent


class FullHead:
    """The target's own LM head, multiplied whole."""

    recordable = True

    def __init__(self, lent: Lent) -> None:
        self.lent = lent
        self.token_V = torch.arange(lent.head_VD.shape[0], device=lent.head_VD.device)

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the whole vocabulary."""
        return Candidates(self.lent.logits(hidden_ND.to(self.lent.head_VD.dtype)), self.token_V)
