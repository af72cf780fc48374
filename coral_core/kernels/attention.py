"""Attention of query heads that share keys and values, and the plug-in that gives it to a target.

Where a mask is given, transformers copies the cached keys and values once for each query head of a group, and a CPU's
kernel reads them as often. Folded, the query heads of a group are rows of one head, so that its keys are read once:
the same products, and no copy. On two cores of an AMD EPYC (AVX-512), 32 heads on 8 of 128, ms per layer:

| behind            |   200 | 2,000 | 8,000 |         11 rows behind | 1,500 | 8,000 |
|-------------------|------:|------:|------:|------------------------|------:|------:|
| 1 row, bfloat16   |  0.69 |  6.98 |  28.3 |                        |   3.6 |  19.7 |
|   folded          |  0.07 |  0.84 |   3.4 |                        |   2.8 |  14.2 |
| 1 row, float32    |  0.08 |  1.68 |  13.4 |                        |   3.4 |  24.9 |
|   folded          |  0.05 |  0.67 |   5.0 |                        |   2.4 |  16.1 |

With more than 16 rows it gains nothing there, and with few keys its 0.004 to 0.016 ms of small operations are a loss,
but for a single row in bfloat16, for which the kernel is slow.
Axes: B batch, H attention head, J key/value head, T position of a new row, K cached column, E head dimension, N row:
the new rows of all heads that share keys, X any axes.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from coral_core.kernels import exact

NAME = "coral_sdpa"
"""How the plug-in is called in a model's config."""
FEW_ROWS, MANY_KEYS = 16, 1 << 17
"""On a CPU, the most rows that are folded, and the fewest elements of the keys that repay it."""


def plug_in(model: Any) -> None:
    """Let a model that attends by PyTorch's kernels read grouped keys in place; others stay as they are."""
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B,T,H,E] of queries [B,H,T,E] over keys and values [B,J,K,E], in the form that transformers asks for."""
    layout = getattr(attention_mask, "columns", None)
    if layout is not None:
        if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
            raise NotImplementedError("exact attention with a bias, a cap or sinks")  # found by the probe, at loading
        return exact.attention(query, key, value, layout, kwargs.get("scaling")), None
    strange = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None or kwargs.get("dropout")
    causal = attention_mask is None and query.shape[2] > 1
    if query.shape[1] == key.shape[1] or causal or strange or kwargs.get("output_attentions"):
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out
    out_BHTE = grouped(query, key, value, attention_mask, kwargs.get("scaling"))
    return out_BHTE.transpose(1, 2).contiguous(), None


def grouped(
    query_BHTE: torch.Tensor,
    key_BJKE: torch.Tensor,
    value_BJKE: torch.Tensor,
    mask_XTK: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention [B,H,T,E]. A mask [T,K] or [B,1,T,K] is true where a row sees, or additive; without, it sees all."""
    batch, heads, rows, width = query_BHTE.shape
    groups = key_BJKE.shape[1]
    if not _folds(query_BHTE, key_BJKE):
        return scaled_dot_product_attention(
            query_BHTE, key_BJKE, value_BJKE, attn_mask=mask_XTK, scale=scale, enable_gqa=heads != groups
        )
    query_BJNE = query_BHTE.reshape(batch, groups, heads // groups * rows, width)
    mask_XNK = mask_XTK
    if mask_XTK is not None:
        mask_XNK = mask_XTK.repeat(*[1] * (mask_XTK.dim() - 2), heads // groups, 1)
    out_BJNE = scaled_dot_product_attention(query_BJNE, key_BJKE, value_BJKE, attn_mask=mask_XNK, scale=scale)
    return out_BJNE.reshape(batch, heads, rows, width)


def _folds(query_BHTE: torch.Tensor, key_BJKE: torch.Tensor) -> bool:
    """Whether it is faster so. A GPU's kernels for masks take no grouped heads at all."""
    rows = query_BHTE.shape[2]
    if query_BHTE.shape[1] == key_BJKE.shape[1]:
        return False
    slow = rows == 1 and query_BHTE.dtype == torch.bfloat16
    return query_BHTE.device.type != "cpu" or slow or (rows <= FEW_ROWS and key_BJKE.numel() >= MANY_KEYS)
