"""One batch's loss: the weighted sum over unroll steps and answer rows, and its parts for the log.

Where the number of unroll steps is drawn, only the last one's outputs are trained: the expected gradient is again one
over steps, and an update costs one step's loss.

Rows that carry a loss are gathered before anything of width V is computed.
Axes: B batch, T position, N row that carries a loss (of a sequence's packed to the left, or of all sequences'), S
unroll step, D hidden.
"""

import dataclasses

import torch

from coral_core.lent import Lent
from coral_core.store.batches import Batch
from coral_core.training.alignment import cross_step_cosine, csra, take_rows
from coral_core.training.candidates import Candidates, HeadRows
from coral_core.training.losses import regression, vocabulary
from coral_core.training.unroll import loss_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the four losses, each per unroll step, and settings of two of them."""

    regression_weight: float = 1.0
    distill_weight: float = 0.1
    topk_weight: float = 0.0
    topk: int = 10
    csra_weight: float = 0.0
    step_decay: float = 1.0
    """Weight of a step's losses on words, over that of the step before it."""
    csra_temperature: float = 0.2
    last_only: bool = False
    """Whether only the last step's outputs are trained; alignment then pulls them to the earlier ones."""
    candidates: Candidates | None = None
    """Which rows of the LM head distillation and top-K read; None: all."""

    def __call__(
        self, hiddens: list[torch.Tensor], batch: Batch, lent: Lent, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(sum over rows of the mean over steps, sums of its parts by name): divide both by the number of rows.

        Parts: `regression`, `distill`, `topk`, `csra` (unweighted, mean over steps), `accuracy_1` … (rows where step
        j's most likely token is the target's), `cosine` (between step 1 and the later ones), and with candidates
        `tail` (the target's probability outside of the certain ones).
        """
        row_BN, present_BN = pack(loss_rows(batch))
        steps = len(hiddens)
        first = steps - 1 if self.last_only else 0  # of those that are trained
        kept = [hidden_BTD.detach() if step < first else hidden_BTD for step, hidden_BTD in enumerate(hiddens)]
        hidden_SBND = torch.stack([take_rows(hidden_BTD, row_BN) for hidden_BTD in kept])
        feature_BND = take_rows(batch.feature_BTD[:, 1:], row_BN)
        hidden_SND, feature_ND = hidden_SBND[first:, present_BN], feature_BND[present_BN]
        weights = (self.distill_weight, self.topk_weight)
        head = self.candidates.rows(lent, batch, generator) if self.candidates else HeadRows.whole(lent)
        words_S, seen = vocabulary(hidden_SND, feature_ND, head, weights, self.topk)
        parts = {"distill": seen.distill_S.mean(), "topk": seen.topk_S.mean()}
        parts["regression"] = regression(hidden_SND, feature_ND.expand_as(hidden_SND)) / len(hidden_SND)
        weight_S = self.step_decay ** torch.arange(len(hidden_SND), device=words_S.device)
        total = (words_S * weight_S).sum() / weight_S.sum() + self.regression_weight * parts["regression"]
        if self.csra_weight:
            aligned = csra(hidden_SBND, present_BN, self.csra_temperature, generator, first) / len(hidden_SND)
            total, parts["csra"] = total + self.csra_weight * aligned, aligned
        parts |= {f"accuracy_{step}": agree for step, agree in enumerate(seen.agree_S, start=first + 1)}
        if self.candidates:
            parts["tail"] = seen.tail_S[0]
        parts["cosine"] = cross_step_cosine(hidden_SBND[:, present_BN])
        return total, {name: value.detach() for name, value in parts.items()}


def pack(rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row_BN, present_BN): each sequence's chosen rows moved to the left, in order; N is the largest count."""
    present_BT, row_BT = rows_BT.sort(dim=1, descending=True, stable=True)
    width = max(1, int(rows_BT.sum(1).max()))
    return row_BT[:, :width], present_BT[:, :width]
