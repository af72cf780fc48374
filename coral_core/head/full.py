"""The full head: every row of the vocabulary, the reference for all others."""

import torch

from coral_core.head.candidates import Candidates
from coral_core.head.products import products
from coral_core.lent import Lent


class FullHead:
    """The target's own LM head, multiplied whole."""

    def __init__(self, lent: Lent) -> None:
        self.lent = lent
        self.token_V = torch.arange(lent.head_VD.shape[0], device=lent.head_VD.device)

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """log q over the whole vocabulary."""
        lent = self.lent
        raw_NV = products(hidden_ND.to(lent.head_VD.dtype), [lent.head_VD])
        if lent.head_bias_V is not None:
            raw_NV = raw_NV + lent.head_bias_V
        return Candidates(lent.transform(raw_NV).float().log_softmax(-1), self.token_V)
