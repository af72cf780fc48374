"""The blocks of the drafter's decoder layer, named as EAGLE's checkpoints name them.

Attention itself is passed in: decoding attends over a cache, training over the streams of the unroll steps.
Axes: B batch, T position, D hidden, H attention head, J key/value head, E head dimension,
Q query: a row whose output is asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from coral_core.kernels.layers import PackedLinear, scaled_norm

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query_BHTE, key_BJTE, value_BJTE) -> out_BHTE, with J key/value heads, H a multiple of J."""
CosSin = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of positions, as `Rope` gives them."""


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 as Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return scaled_norm(x_BTD, self.weight, self.eps)


class Rope(nn.Module):
    """Rotary position embedding with the target's own frequencies (llama3, yarn … as transformers computes them)."""

    inv_freq_E: torch.Tensor

    def __init__(self, llama_config: Any) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        reference = LlamaRotaryEmbedding(llama_config)
        self.register_buffer("inv_freq_E", reference.inv_freq.float(), persistent=False)
        self.scaling = float(reference.attention_scaling)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Rope":
        """Frequencies follow the module to a device and never to a dtype.

        In bfloat16 they are off by up to 0.2 %: for pico a fifth of a radian at position 500, and growing with it.
        """
        exact_E = self.inv_freq_E
        super()._apply(fn, recurse)
        self.inv_freq_E = exact_E.to(self.inv_freq_E.device)
        return self

    def forward(self, position_BT: torch.Tensor, dtype: torch.dtype) -> CosSin:
        """cos and sin, each [B,1,T,E], ready to broadcast over heads; the sine's first half is negative (`rotate`)."""
        angle_BTE = position_BT[..., None].float() * self.inv_freq_E
        angle_B1TE = torch.cat((-angle_BTE, angle_BTE), dim=-1)[:, None]
        return (angle_B1TE.cos() * self.scaling).to(dtype), (angle_B1TE.sin() * self.scaling).to(dtype)


def rotate(x_BHTE: torch.Tensor, cos_B1TE: torch.Tensor, sin_B1TE: torch.Tensor) -> torch.Tensor:
    """CosSin each pair (i, i + E/2) of a head by its position's angle: Llama's half-split layout."""
    return torch.addcmul(x_BHTE * cos_B1TE, x_BHTE.roll(x_BHTE.shape[-1] // 2, dims=-1), sin_B1TE)


def rows_asked(x_BTD: torch.Tensor, asked_Q: torch.Tensor | None) -> torch.Tensor:
    """The rows [B,Q,D] whose output is asked for; all where that is None. The others give keys and values alone."""
    return x_BTD if asked_Q is None else x_BTD.index_select(-2, asked_Q)


class Attention(nn.Module):
    """Grouped-query attention without biases or q/k norm: what the serving engines' drafter class has.

    `inputs` is the width of what queries, keys and values are made from.
    """

    def __init__(self, inputs: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = PackedLinear(inputs, heads * head_dim, bias=False)
        self.k_proj = PackedLinear(inputs, kv_heads * head_dim, bias=False)
        self.v_proj = PackedLinear(inputs, kv_heads * head_dim, bias=False)
        self.o_proj = PackedLinear(heads * head_dim, hidden, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: CosSin, attend: Attend, asked_Q: torch.Tensor | None = None
    ) -> torch.Tensor:
        def split(y_BTD: torch.Tensor) -> torch.Tensor:
            return y_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        cos_B1QE, sin_B1QE = (rows_asked(part_B1TE, asked_Q) for part_B1TE in cos_sin)
        query_BHQE = rotate(split(self.q_proj(rows_asked(x_BTD, asked_Q))), cos_B1QE, sin_B1QE)
        key_BJTE = rotate(split(self.k_proj(x_BTD)), *cos_sin)
        out_BHQE = attend(query_BHQE, key_BJTE, split(self.v_proj(x_BTD)))
        return self.o_proj(out_BHQE.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated MLP with SiLU."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(hidden, intermediate, bias=False)
        self.up_proj = PackedLinear(hidden, intermediate, bias=False)
        self.down_proj = PackedLinear(intermediate, hidden, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DraftLayer(nn.Module):
    """EAGLE's decoder layer: no norm before attention, one after it."""

    def __init__(self, hidden: int, heads: tuple[int, int, int], intermediate: int, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(hidden, hidden, *heads)
        self.mlp = MLP(hidden, intermediate)
        self.post_attention_layernorm = RMSNorm(hidden, eps)

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: CosSin, attend: Attend, asked_Q: torch.Tensor | None = None
    ) -> torch.Tensor:
        x_BQD = rows_asked(x_BTD, asked_Q) + self.self_attn(x_BTD, cos_sin, attend, asked_Q)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))


class WideLayer(nn.Module):
    """EAGLE-3's decoder layer: queries, keys and values read [embedding ; state], each half under a norm of its own."""

    def __init__(
        self, hidden: int, heads: tuple[int, int, int], intermediate: int, eps: float, *, norm_before_residual: bool
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = Attention(2 * hidden, hidden, *heads)
        self.mlp = MLP(hidden, intermediate)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.norm_before_residual = norm_before_residual

    def forward(
        self,
        embed_BTD: torch.Tensor,
        state_BTD: torch.Tensor,
        cos_sin: CosSin,
        attend: Attend,
        asked_Q: torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed_BTD = self.hidden_norm(state_BTD)
        joined_BTD = torch.cat((self.input_layernorm(embed_BTD), normed_BTD), dim=-1)
        residual_BTD = normed_BTD if self.norm_before_residual else state_BTD
        x_BQD = rows_asked(residual_BTD, asked_Q) + self.self_attn(joined_BTD, cos_sin, attend, asked_Q)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))
