"""Attention over a tree's mask on a CPU: a plug-in of transformers' own attention interface.

Where a mask is given, transformers copies the cached keys and values once for each query head of a group: the kernels
of a GPU want that, a CPU's does not. Everything else is handed to transformers' own function. 24 layers, 11 rows, 4
heads on 2, time of a forward against the copying one: 0.94 behind 200 rows, 0.85 behind 1,500 (float32; bfloat16 0.90).
Axes: B batch, H attention head, G key/value head, T new row, K cached row, E head dimension.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "coral_sdpa"
"""How the plug-in is called in a model's config."""


def plug_in(model: Any) -> None:
    """Let a model that attends by PyTorch's kernels on a CPU read grouped keys in place; others stay as they are."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
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
    """[B,T,H,E] of queries [B,H,T,E] over keys and values [B,G,K,E]."""
    strange = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    plain = attention_mask is None or query.shape[1] == key.shape[1]
    if plain or strange or kwargs.get("output_attentions") or query.device.type != "cpu":
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out
    out_BHTE = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=True,
    )
    return out_BHTE.transpose(1, 2).contiguous(), None
