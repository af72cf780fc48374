"""The grouped head: a router reads the drafter's hidden state, and only the best groups' rows are multiplied (CORAL).

The rows are permuted once so that a group is one contiguous block, and an active group a slice. All rows of one tree
level share their groups: a union with a fixed budget reads each weight once, whatever the number of rows.
Axes: N row, D hidden, V vocabulary in permuted order, G group, R place in a list of active groups, C candidate token.
"""

import torch

from coral_core.head.candidates import Candidates
from coral_core.head.groups import Groups
from coral_core.head.router import Router
from coral_core.kernels import blocks
from coral_core.kernels.products import Blocks, runs
from coral_core.lent import Lent


class GroupedHead:
    """`active` groups per call. Keeps a permuted copy of the head's rows."""

    def __init__(self, lent: Lent, groups: Groups, router: Router, active: int) -> None:
        device, self.dtype = lent.head_VD.device, lent.head_VD.dtype
        self.lent, self.active, self.start_G = lent, active, groups.start_G
        self.router = router.to(device, self.dtype).requires_grad_(False).eval()
        self.token_V = groups.order_V.to(device)
        self.bias_V = None if lent.head_bias_V is None else lent.head_bias_V[self.token_V]
        rows_VD = lent.head_VD[self.token_V]
        self.fused = blocks.fits(lent, rows_VD)
        self.recordable = self.fused  # which groups are active then stays on the device
        self.start_device_G = torch.tensor(self.start_G, dtype=torch.int32, device=device)
        self.blocks = Blocks(rows_VD, self.start_G)

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the active groups' tokens.

        Nothing is made of the mass that the router sees elsewhere: branches scored with it, so that a row whose groups
        were crowded out of the union counts for less, gave 0.996 to 1.016 of tau (pico, 2, 4 and 16 of 256 groups).
        """
        hidden_ND = hidden_ND.to(self.dtype)
        chosen_R = self.router(hidden_ND).softmax(-1, dtype=torch.float32).sum(0).topk(self.active).indices
        if self.fused and self.blocks.rows_VD is not None:
            start_G = self.start_device_G
            best = blocks.grouped_best(hidden_ND, self.blocks.rows_VD, start_G, chosen_R[None], self.bias_V)
            return Candidates(best.logit_NC, self.token_V[best.row_NC])
        active = sorted(chosen_R.tolist())
        spans = runs(active, self.start_G)
        raw_NC = self.blocks.products(hidden_ND, active)
        if self.bias_V is not None:
            raw_NC = raw_NC + _gather(self.bias_V, spans)
        return Candidates(self.lent.transform(raw_NC), _gather(self.token_V, spans))


def _gather(by_row_V: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    parts = [by_row_V[first:end] for first, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
