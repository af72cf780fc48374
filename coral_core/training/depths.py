"""What a drafter is worth depth by depth, on held-out dialogues: the numbers beside tau while it trains.

Not tau itself, which only decoding gives. Axes: B batch, T position, S unroll step, N row that carries a loss, D
hidden, R place in a list of the most likely tokens.
"""

from typing import Any

import torch

from coral_core.drafter.model import Drafter
from coral_core.lent import Lent
from coral_core.store.batches import batch_of
from coral_core.store.store import Store
from coral_core.training.alignment import cross_step_cosine
from coral_core.training.losses import logits
from coral_core.training.trainer import MicroBatch
from coral_core.training.unroll import loss_rows, unroll

DEPTHS = 5
"""Unroll steps looked at, whatever the training's own number: methods can be compared."""
RANKS = 5
DIALOGUES = 8
"""Dialogues per forward pass."""
CHUNK = 512
"""Rows whose logits exist at once."""


@torch.no_grad()
def by_depth(drafter: Drafter, lent: Lent, store: Store, device: torch.device) -> dict[str, Any]:
    """`accuracy_by_depth`[depth][rank]: how often the target's token is among the drafter's rank + 1 best at that
    depth; `held_out_cosine`: between the first depth's output and the later ones'. Empty when nothing is held out.
    """
    hits = torch.zeros(DEPTHS, RANKS, device=device)
    cosine, count = torch.zeros((), device=device), 0
    indices = list(store.holdout_indices)
    for first in range(0, len(indices), DIALOGUES):
        batch = MicroBatch.make(batch_of(store, indices[first : first + DIALOGUES]), 0, device).batch
        wanted_BT = loss_rows(batch)
        outputs = unroll(drafter, lent, batch, DEPTHS, wanted_BT=wanted_BT)
        feature_ND = batch.feature_BTD[:, 1:][wanted_BT]
        hidden_SND = torch.stack([output_BTD[wanted_BT] for output_BTD in outputs])
        cosine, count = cosine + cross_step_cosine(hidden_SND), count + len(feature_ND)
        for start in range(0, len(feature_ND), CHUNK):
            token_N = logits(lent, feature_ND[start : start + CHUNK]).argmax(-1)
            for depth, hidden_ND in enumerate(hidden_SND[:, start : start + CHUNK]):
                best_NR = logits(lent, hidden_ND).topk(RANKS, dim=-1).indices
                hits[depth] += (best_NR == token_N[:, None]).cumsum(-1).sum(0)
    if count == 0:
        return {}
    return {"accuracy_by_depth": (hits / count).tolist(), "held_out_cosine": float(cosine) / count}
