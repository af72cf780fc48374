"""The rows of the LM head that a batch's loss reads, in place of all V of them: its candidates.

Where V is large the vocabulary is nearly all of a step's cost: 5/6 of its operations at 49,152 rows, 9/10 at 151,936.
Nearly all of the target's probability lies on few tokens: those that are frequent in its answers, and those of this
batch's answers. These are read for certain. Of the other rows, the tail, some are drawn at random for each batch, and
each counts as often as there are rows that it stands for, in the target's sums as in the drafter's: so both
distributions stay almost unbiased, and what lies outside the certain rows is measured, not ignored.
Sampled softmax: Jean et al. 2015, arXiv 1412.2007; here the target's side is sampled too.

Axes: V vocabulary, D hidden, C candidate token.
"""

import dataclasses
import math

import torch

from coral_core.lent import Lent
from coral_core.store.batches import Batch
from coral_core.store.store import Store

DRAWN = 4
"""One candidate in so many is drawn from the tail; the others are the most frequent tokens."""


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """Rows of the LM head, and how many each stands for."""

    lent: Lent
    """Its head and bias hold these rows only."""
    certain: int
    """The first so many stand for themselves."""
    log_weight: float
    """Each of the others stands for exp(log_weight) rows."""

    @classmethod
    def whole(cls, lent: Lent) -> "HeadRows":
        """Every row, once."""
        return cls(lent, len(lent.head_VD), 0.0)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a batch's candidates are drawn by."""

    frequent_C: torch.Tensor
    """Tokens that are candidates of every batch."""
    drawn: int
    """Rows drawn from the tail for each batch."""

    @classmethod
    def of(cls, store: Store, count: int, device: torch.device) -> "Candidates | None":
        """About `count` rows a batch: the tokens most frequent in the store's answers, and the drawn ones.

        None, for the whole vocabulary, where `count` is 0 or not below its size.
        """
        vocabulary = store.manifest.facts["vocab"]
        if not 0 < count < vocabulary:
            return None
        drawn = max(1, count // DRAWN)
        order_V = store.answer_counts().argsort(descending=True, stable=True)
        return cls(order_V[: count - drawn].to(device), drawn)

    def rows(self, lent: Lent, batch: Batch, generator: torch.Generator | None = None) -> HeadRows:
        """The candidates of a batch: frequent tokens, those of its answers, and rows drawn from all others."""
        certain_V = torch.zeros(len(lent.head_VD), dtype=torch.bool, device=lent.head_VD.device)
        certain_V[self.frequent_C] = True
        certain_V[batch.ids_BT[batch.answer_BT]] = True
        certain_C, tail_C = certain_V.nonzero()[:, 0], (~certain_V).nonzero()[:, 0]
        if not len(tail_C):
            return HeadRows.whole(lent)
        place_C = torch.randint(len(tail_C), (self.drawn,), generator=generator, device=tail_C.device)
        row_C = torch.cat((certain_C, tail_C[place_C]))
        bias_C = None if lent.head_bias_V is None else lent.head_bias_V[row_C]
        chosen = dataclasses.replace(lent, head_VD=lent.head_VD.index_select(0, row_C), head_bias_V=bias_C)
        return HeadRows(chosen, len(certain_C), math.log(len(tail_C) / self.drawn))
