"""The unroll's attention and the losses over the vocabulary as the papers write them: whole tensors, plain autograd.

The fast forms in coral_core are held against these; benchmarks/train.py times them.
Axes: B batch, H attention head, T position, E head dimension, N row that carries a loss, D hidden, V vocabulary, R
place in a list of the top K tokens.
"""

from collections.abc import Sequence

import torch

from coral_core.lent import Lent
from coral_core.training.losses import logits


def attend_eager(
    query_BHTE: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The reference: all T x T scores, each offset taken from its stream. Differentiable by autograd."""
    rows, scale = query_BHTE.shape[2], query_BHTE.shape[3] ** -0.5
    offset_TT = torch.arange(rows, device=query_BHTE.device)[:, None] - torch.arange(rows, device=query_BHTE.device)
    stream_of_TT = (len(keys) - 1 - offset_TT).clamp(min=0)  # columns to come belong to none: above the newest
    score_BHTT = torch.full_like(query_BHTE[..., :1], -torch.inf).expand(-1, -1, -1, rows)
    for stream, key_BHTE in enumerate(keys):
        score_BHTT = torch.where(stream_of_TT == stream, query_BHTE @ key_BHTE.transpose(-1, -2) * scale, score_BHTT)
    weight_BHTT = score_BHTT.softmax(-1)
    out_BHTE = torch.zeros_like(query_BHTE)
    for stream, value_BHTE in enumerate(values):
        out_BHTE = out_BHTE + (weight_BHTT * (stream_of_TT == stream)) @ value_BHTE
    return out_BHTE


def distill(hidden_ND: torch.Tensor, feature_ND: torch.Tensor, lent: Lent) -> torch.Tensor:
    """Cross-entropy of the drafter's distribution against the target's whole one, sum over N."""
    p_NV = logits(lent, feature_ND).softmax(-1)
    return -(p_NV * logits(lent, hidden_ND).log_softmax(-1)).sum()


def topk(hidden_ND: torch.Tensor, feature_ND: torch.Tensor, lent: Lent, k: int) -> torch.Tensor:
    """HASS's cross-entropy on the target's k most likely tokens, p not renormalised, sum over N."""
    p_NR, token_NR = logits(lent, feature_ND).softmax(-1).topk(k, dim=-1)
    return -(p_NR * logits(lent, hidden_ND).log_softmax(-1).gather(-1, token_NR)).sum()
