"""A static head: always the same tokens, the most frequent ones (FR-Spec, arXiv 2502.14856). A baseline.

Axes: N row, D hidden, K kept token.
"""

import torch

from coral_core.head.candidates import Candidates
from coral_core.kernels.products import Blocks
from coral_core.lent import Lent


class StaticHead:
    """The rows of the tokens that were kept, copied once into one block: the target's, or a drafter's own."""

    recordable = True

    def __init__(self, lent: Lent, token_K: torch.Tensor, own_KD: torch.Tensor | None = None) -> None:
        self.lent = lent
        self.token_K = token_K.to(lent.head_VD.device)
        self.dtype = lent.head_VD.dtype
        rows_KD = lent.head_VD[self.token_K] if own_KD is None else own_KD.to(lent.head_VD)
        self.block = Blocks(rows_KD, [0, self.token_K.numel()])
        own = own_KD is not None or lent.head_bias_V is None
        self.bias_K = None if own else lent.head_bias_V[self.token_K]  # type: ignore[index]

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the kept tokens."""
        raw_NK = self.block.products(hidden_ND.to(self.dtype), [0])
        if self.bias_K is not None:
            raw_NK = raw_NK + self.bias_K
        return Candidates(self.lent.transform(raw_NK), self.token_K)
