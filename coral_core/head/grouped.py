"""The grouped head: a router reads the drafter's hidden state, and only the best groups' rows are multiplied (CORAL).

The rows are permuted once so that a group is one contiguous block, and an active group a slice. All rows of one tree
level share their groups: a union with a fixed budget reads each weight once, whatever the number of rows.
Axes: N row, D hidden, V vocabulary in permuted order, G group, C row of the active groups.
"""

import torch

from coral_core.head.candidates import Candidates
from coral_core.head.groups import Groups, runs
from coral_core.head.products import products
from coral_core.head.router import Router
from coral_core.lent import Lent


class GroupedHead:
    """`active` groups per call. Keeps a permuted copy of the head's rows."""

    def __init__(self, lent: Lent, groups: Groups, router: Router, active: int) -> None:
        device, dtype = lent.head_VD.device, lent.head_VD.dtype
        self.lent, self.active, self.start_G = lent, active, groups.start_G
        self.router = router.to(device, dtype).requires_grad_(False).eval()
        self.token_V = groups.order_V.to(device)
        self.rows_VD = lent.head_VD[self.token_V].contiguous()
        self.bias_V = None if lent.head_bias_V is None else lent.head_bias_V[self.token_V]

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """log q over the active groups' tokens.

        q(v) = P(active) · softmax over the active rows: the router says how much mass lies in what was read, so that
        branches stay comparable when one row's groups were crowded out of the union.
        """
        hidden_ND = hidden_ND.to(self.rows_VD.dtype)
        routed_NG = self.router(hidden_ND).float().softmax(-1)
        chosen = routed_NG.sum(0).topk(self.active).indices
        spans = runs(chosen.tolist(), self.start_G)
        raw_NC = products(hidden_ND, [self.rows_VD[first:end] for first, end in spans])
        if self.bias_V is not None:
            raw_NC = raw_NC + _gather(self.bias_V, spans)
        mass_N1 = routed_NG[:, chosen].sum(-1, keepdim=True).clamp_max(1)
        return Candidates(
            self.lent.transform(raw_NC).float().log_softmax(-1) + mass_N1.log(), _gather(self.token_V, spans)
        )


def _gather(by_row_V: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    parts = [by_row_V[first:end] for first, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
