"""SGLang's token map: the static form of a grouped head, a list of the tokens that the drafter may propose.

The groups are ranked by the probability mass that the router gives them while the drafter decodes; the map is the union
of the best ones, the last one cut to size by frequency.
Axes: N row, D hidden, V vocabulary, G group, K kept token.
"""

import torch

from coral_core.head.candidates import Candidates, Head
from coral_core.head.grouped import GroupedHead


class RouterMass:
    """The full head's answers, while the router's opinion of every row is added up in `mass_G`."""

    def __init__(self, full: Head, grouped: GroupedHead) -> None:
        self.full, self.grouped = full, grouped
        self.mass_G = torch.zeros(len(grouped.start_G) - 1, dtype=torch.float64)

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """What the full head answers."""
        routed_NG = self.grouped.router(hidden_ND.to(self.grouped.rows_VD.dtype)).float().softmax(-1)
        self.mass_G += routed_NG.sum(0).double().cpu()
        return self.full.candidates(hidden_ND)


def union(grouped: GroupedHead, mass_G: torch.Tensor, size: int) -> torch.Tensor:
    """Ids [K], K = `size`, of the groups with the most mass; where equal, in the groups' own order, by frequency."""
    start_G = grouped.start_G
    ranked = mass_G.argsort(descending=True, stable=True).tolist()
    order_V = torch.cat([grouped.token_V[start_G[group] : start_G[group + 1]] for group in ranked])
    return order_V[:size].cpu()
