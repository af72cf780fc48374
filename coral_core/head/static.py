"""A static head: always the same tokens, the most frequent ones (FR-Spec, arXiv 2502.14856). A baseline.

Axes: N row, D hidden, C candidate token: one that was kept.
"""

import torch

from coral_core.head.candidates import Candidates
from coral_core.kernels.products import Blocks
from coral_core.lent import Lent


class StaticHead:
    """The rows of the tokens that were kept, copied once into one block: the target's, or a drafter's own."""

    recordable = True

    def __init__(self, lent: Lent, token_C: torch.Tensor, own_CD: torch.Tensor | None = None) -> None:
        self.lent = lent
        self.token_C = token_C.to(lent.head_VD.device)
        self.dtype = lent.head_VD.dtype
        rows_CD = lent.head_VD[self.token_C] if own_CD is None else own_CD.to(lent.head_VD)
        self.block = Blocks(rows_CD, [0, self.token_C.numel()])
        own = own_CD is not None or lent.head_bias_V is None
        self.bias_C = None if own else lent.head_bias_V[self.token_C]  # type: ignore[index]

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the kept tokens."""
        raw_NC = self.block.products(hidden_ND.to(self.dtype), [0])
        if self.bias_C is not None:
            raw_NC = raw_NC + self.bias_C
        return Candidates(self.lent.transform(raw_NC), self.token_C)
