"""The losses of one unroll step, as sums in float32 over the rows that count; the loop divides by their number.

`vocabulary` gives distillation's and the top-K loss's sums and gradients for all steps at once in bounded memory: chunk
by chunk, the target's distribution is made once, and each step's gradient is taken while its logits are at hand (they
are never kept, and never made twice). Over whole [N,V] tensors: tests/training/reference.py.
Sums of the papers' equations, CORAL arXiv 2502.16880, HASS 2408.15766.

Axes: N row that carries a loss, S unroll step, D hidden, V vocabulary, R place in a list of the top K tokens, X any
axes.
"""

import dataclasses
from typing import Any

import torch

from coral_core.lent import Lent
from coral_core.training.candidates import HeadRows
from coral_core.training.rows import missing_rows

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Elements of one [chunk, V] tensor, half as many again at most; four or five live at once. Near a CPU's cache."""
CHUNK_ROWS = 64
"""Fewest rows of a chunk, whatever V: below this the head's rows are read more often than they are worth."""


def regression(hidden_ND: torch.Tensor, feature_ND: torch.Tensor) -> torch.Tensor:
    """Smooth L1 between drafted and true features: mean over D, sum over N."""
    distance_ND = torch.nn.functional.smooth_l1_loss(hidden_ND.float(), feature_ND.float(), reduction="none")
    return distance_ND.mean(-1).sum()


def logits(lent: Lent, hidden_ND: torch.Tensor) -> torch.Tensor:
    """float32 logits [N,V]; the product runs in the head's dtype."""
    return lent.logits(_for_head(hidden_ND, lent))[: len(hidden_ND)].float()


def _for_head(x_NX: torch.Tensor, lent: Lent) -> torch.Tensor:
    """Rows as a product with the head takes them: in its dtype, filled up where that is faster."""
    dtype = lent.head_VD.dtype
    missing = missing_rows(len(x_NX), x_NX.device, dtype)
    return torch.nn.functional.pad(x_NX.to(dtype), (0, 0, 0, missing)) if missing else x_NX.to(dtype)


@dataclasses.dataclass(frozen=True)
class VocabularyParts:
    """Sums over N for each unroll step, without gradient, for the log."""

    distill_S: torch.Tensor
    topk_S: torch.Tensor
    agree_S: torch.Tensor
    """Rows where the drafter's most likely token is the target's."""
    tail_S: torch.Tensor
    """The target's probability outside of the certain rows; the same for every step."""


def vocabulary(
    hidden_SND: torch.Tensor, feature_ND: torch.Tensor, head: HeadRows, weights: tuple[float, float], k: int
) -> tuple[torch.Tensor, VocabularyParts]:
    """`weights[0]` · distill + `weights[1]` · topk, of each step [S], summed over N, and its parts.

    With candidates both are estimates: a drawn row counts as often as there are rows that it stands for. The top-K
    tokens and the most likely one are looked for among the certain rows.
    """
    most = max(CHUNK_ROWS, CHUNK_ELEMENTS[feature_ND.device.type] // len(head.lent.head_VD))
    pieces = max(1, round(len(feature_ND) / most))  # equal ones: a short last chunk reads the head for little
    rows = max(1, -(-len(feature_ND) // pieces))
    total_S, parts_4S = _Vocabulary.apply(hidden_SND, feature_ND, head, weights, (min(k, head.certain), rows))
    return total_S, VocabularyParts(*parts_4S)


class _Vocabulary(torch.autograd.Function):
    """With g = w_d p + w_k p[top-K only], the loss is -Σ_v g log q, and its gradient in the logits q Σ_v g - g."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SND: torch.Tensor,
        feature_ND: torch.Tensor,
        head: HeadRows,
        weights: tuple[float, float],
        sizes: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, rows = sizes
        grad_SND = torch.zeros_like(hidden_SND) if ctx.needs_input_grad[0] else None
        parts_4S = torch.zeros(4, len(hidden_SND), device=hidden_SND.device)
        for start in range(0, len(feature_ND), rows):
            chunk = slice(start, start + rows)
            labels = _labels(feature_ND[chunk], head, weights, k)
            for step, hidden_ND in enumerate(hidden_SND[:, chunk]):
                out_ND = None if grad_SND is None else grad_SND[step, chunk]
                parts_4S[:, step] += _chunk(hidden_ND, labels, head, out_ND)
        ctx.save_for_backward(grad_SND)
        ctx.mark_non_differentiable(parts_4S)
        return weights[0] * parts_4S[0] + weights[1] * parts_4S[1], parts_4S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_SND,) = ctx.saved_tensors
        return (grad_SND * grads[0][:, None, None], None, None, None, None)


@dataclasses.dataclass(frozen=True)
class _Labels:
    """The soft labels of a chunk of rows: the target's probabilities, and what of them the losses weigh."""

    p_NV: torch.Tensor
    p_NR: torch.Tensor
    token_NR: torch.Tensor
    g_NV: torch.Tensor


def _labels(feature_ND: torch.Tensor, head: HeadRows, weights: tuple[float, float], k: int) -> _Labels:
    p_NV = _counted(logits(head.lent, feature_ND), head).softmax(-1)
    p_NR, token_NR = p_NV[:, : head.certain].topk(k, dim=-1)
    g_NV = (p_NV * weights[0]).scatter_add_(-1, token_NR, p_NR * weights[1])
    return _Labels(p_NV, p_NR, token_NR, g_NV)


def _counted(z_NV: torch.Tensor, head: HeadRows) -> torch.Tensor:
    """The logits, changed in place, such that softmax counts each row as often as it stands for one."""
    if head.log_weight:
        z_NV[:, head.certain :] += head.log_weight
    return z_NV


def _chunk(hidden_ND: torch.Tensor, labels: _Labels, head: HeadRows, grad_ND: torch.Tensor | None) -> torch.Tensor:
    """The parts' sums over a chunk; the gradient of the weighted sum goes into `grad_ND`."""
    z_NV = logits(head.lent, hidden_ND)
    token_N = z_NV[:, : head.certain].argmax(-1) if head.log_weight else None
    z_NR, dot_N = z_NV.gather(-1, labels.token_NR), torch.linalg.vecdot(labels.p_NV, z_NV)
    slope_NV = _transform_slope(z_NV, head.lent)
    best_N, place_N = _counted(z_NV, head).max(-1)
    q_NV = torch.softmax(z_NV, -1)
    del z_NV
    lse_N = best_N - q_NV.gather(-1, place_N[:, None])[:, 0].log()
    topk_sum = (labels.p_NR * (lse_N[:, None] - z_NR)).sum()
    agree = ((place_N if token_N is None else token_N) == labels.token_NR[:, 0]).sum()
    parts_4 = torch.stack(((lse_N - dot_N).sum(), topk_sum, agree, labels.p_NV[:, head.certain :].sum()))
    if grad_ND is None:
        return parts_4
    d_logits_NV = q_NV.mul_(labels.g_NV.sum(-1, keepdim=True)).sub_(labels.g_NV)
    if slope_NV is not None:
        d_logits_NV *= slope_NV
    grad_ND.copy_((_for_head(d_logits_NV, head.lent) @ head.lent.head_VD)[: len(grad_ND)])
    return parts_4


def _transform_slope(z_NV: torch.Tensor, lent: Lent) -> torch.Tensor | float | None:
    """d(logits)/d(raw products) of `Lent.transform`, from its result."""
    if lent.logit_softcap:
        return (1 - (z_NV / lent.logit_softcap) ** 2) * lent.logit_scale
    return None if lent.logit_scale == 1.0 else lent.logit_scale
