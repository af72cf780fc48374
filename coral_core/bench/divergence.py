"""Where speculative ids leave plain ones, and whether rounding alone explains it.

Axes: T position, V vocabulary.
"""

from typing import Any

import torch

from coral_core.decoding.cache import SlotCache
from coral_core.decoding.rounds import prefill
from coral_core.decoding.sampling import Sampler
from coral_core.target.load import Target

ROWS = (1, 2, 4, 8, 16)
"""Rows forwarded at once: plain decoding has one, a verified tree as many as it has nodes."""


def diverges(
    target: Target, sampler: Sampler, prompt: list[int], plain_ids: list[int], ids: list[int]
) -> dict[str, Any] | None:
    """None when the ids are equal; else the place, both tokens, and how far apart their two logits are there.

    `logit_gap` is the distance of what the sampler compares: at temperature 0 the logits after any penalty, above it
    the warped logits plus noise. `rounding` is how much that distance moves when the same logits come from passes of 1
    to 16 rows. `tie` is a gap within that rounding: either token was right. A gap well beyond it is a bug.
    """
    if plain_ids == ids:
        return None
    at = next((i for i, pair in enumerate(zip(plain_ids, ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return {"position": min(len(plain_ids), len(ids)), "reason": "one answer is longer", "tie": False}
    context = prompt + plain_ids[:at]
    gaps = [_difference(target, sampler, context, (plain_ids[at], ids[at]), rows) for rows in ROWS]
    gap, rounding = abs(gaps[0]), max(gaps) - min(gaps)
    pair = {"plain": plain_ids[at], "speculative": ids[at]}
    return {"position": at, **pair, "logit_gap": gap, "rounding": rounding, "tie": gap <= rounding}


@torch.no_grad()
def _difference(target: Target, sampler: Sampler, context: list[int], pair: tuple[int, int], rows: int) -> float:
    """The first token's score minus the second's, from a pass whose last `rows` rows went in together."""
    ids_T = torch.tensor(context, device=target.device)
    cache = SlotCache(target.model.config.get_text_config().num_hidden_layers, len(context))
    if len(context) > rows:
        prefill(target, ids_T[:-rows], cache)
    score_1V = sampler.warp(target.lent.logits(prefill(target, ids_T, cache)[-1:]), ids_T[None])
    if sampler.temperature > 0:
        position_1 = torch.tensor([len(context)], device=target.device)
        score_1V = score_1V + sampler.noise(position_1, score_1V.shape[-1])
    return float(score_1V[0, pair[0]] - score_1V[0, pair[1]])
