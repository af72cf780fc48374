"""Where speculative ids leave plain ones, and whether rounding alone explains it.

Axes: T position, V vocabulary, P one of the two tokens.
"""

from typing import Any

import torch

from coral_core.decoding.cache import SlotCache
from coral_core.decoding.rounds import prefill
from coral_core.decoding.sampling import Sampler
from coral_core.target.target import Target

ROWS = (1, 2, 4, 8, 16)
"""Rows forwarded at once: plain decoding has one, a verified tree as many as it has nodes."""


def diverges(
    target: Target, sampler: Sampler, prompt: list[int], plain_ids: list[int], ids: list[int]
) -> dict[str, Any] | None:
    """None when the ids are equal; else the place, both tokens, and how far apart their two logits are there.

    `logit_gap` is the distance of what the sampler compares: at temperature 0 the logits after any penalty, above it
    the warped logits plus noise. `rounding` is how much that distance moves when the same logits come from passes of 1
    to 16 rows, plus one unit in the last place of the larger logit in the target's dtype. `tie` is a gap within that:
    either token was right. A gap well beyond it is a bug.
    """
    if plain_ids == ids:
        return None
    at = next((i for i, pair in enumerate(zip(plain_ids, ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return {"position": min(len(plain_ids), len(ids)), "reason": "one answer is longer", "tie": False}
    context, pair_P = prompt + plain_ids[:at], torch.tensor([plain_ids[at], ids[at]], device=target.device)
    scores = [_scores(target, sampler, context, rows)[pair_P] for rows in ROWS]
    noise_LV = sampler.ahead(len(context), 1, target.lent.head_VD.shape[0], target.device).noise_LV
    noise_P = torch.zeros(2, device=target.device) if noise_LV is None else noise_LV[0, pair_P]
    gaps = [float((score_P + noise_P).diff()) for score_P in scores]
    last_place = torch.finfo(target.dtype).eps * float(scores[0].abs().max())
    gap, rounding = abs(gaps[0]), max(gaps) - min(gaps) + last_place
    both = {"plain": plain_ids[at], "speculative": ids[at]}
    return {"position": at, **both, "logit_gap": gap, "rounding": rounding, "tie": gap <= rounding}


@torch.no_grad()
def _scores(target: Target, sampler: Sampler, context: list[int], rows: int) -> torch.Tensor:
    """The warped logits [V] after the context, from a pass whose last `rows` rows went in together."""
    ids_T = torch.tensor(context, device=target.device)
    cache = SlotCache(target.model.config.get_text_config().num_hidden_layers, len(context))
    if len(context) > rows:
        prefill(target, ids_T[:-rows], cache)
    logits_1V = target.logits(prefill(target, ids_T, cache)[-1:])
    return sampler.warp(logits_1V, ids_T[None])[0]
