"""What one row of an unroll step attends to, twice: an eager reference and a fast form with O(R) memory per head.

In step F the query of row r sees, under one softmax: offset 0 -> stream F-1, offset 1 -> stream F-2, …, offset F-2 ->
stream 1, and every offset >= F-1 -> stream 0, the target's own features. That is what the F-th drafted token sees when
decoding. HASS's public code multiplies masked scores by 0 and keeps their columns in the softmax; here a masked column
is not in the softmax at all.

Axes: B batch, H attention head, R row (as many queries as columns), E head dimension, F stream, newest last.
Keys and values are already repeated to H heads. Private ops of torch are confined to `flash` and `flash_backward`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

StreamAttention = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
"""(query_BHRE, keys of each stream, values of each stream) -> out_BHRE."""

_SHORT = 512
"""Rows below which a CPU's 16-bit backward is slower than float32's: 3.7 times at 105 rows, 0.56 at 2,048 (AMX)."""
_ALIGN = 32
"""Rows to which the memory-efficient CUDA kernel pads its log-sum-exp."""


def attend_eager(
    query_BHRE: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The reference: all R x R scores, each offset taken from its stream. Differentiable by autograd."""
    rows, scale = query_BHRE.shape[2], query_BHRE.shape[3] ** -0.5
    offset_RR = torch.arange(rows, device=query_BHRE.device)[:, None] - torch.arange(rows, device=query_BHRE.device)
    stream_of_RR = (len(keys) - 1 - offset_RR).clamp(min=0)  # columns to come belong to none: above the newest
    score_BHRR = torch.full_like(query_BHRE[..., :1], -torch.inf).expand(-1, -1, -1, rows)
    for stream, key_BHRE in enumerate(keys):
        score_BHRR = torch.where(stream_of_RR == stream, query_BHRE @ key_BHRE.transpose(-1, -2) * scale, score_BHRR)
    weight_BHRR = score_BHRR.softmax(-1)
    out_BHRE = torch.zeros_like(query_BHRE)
    for stream, value_BHRE in enumerate(values):
        out_BHRE = out_BHRE + (weight_BHRR * (stream_of_RR == stream)) @ value_BHRE
    return out_BHRE


def attend_fast(query_BHRE: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Equal to `attend_eager`: flash attention over stream 0, merged with one column per later stream."""
    return _Merged.apply(query_BHRE, *keys, *values)


class _Merged(torch.autograd.Function):
    """One softmax over a causal base and F-1 diagonals.

    The flash backward uses the forward only through P = exp(score - lse) and D = sum(dO * O). Given the merged lse and
    the merged output it therefore returns the exact gradients of the base columns; the diagonals' are in closed form.
    """

    @staticmethod
    def forward(ctx: Any, query_BHRE: torch.Tensor, *streams: torch.Tensor) -> torch.Tensor:
        keys, values = streams[: len(streams) // 2], streams[len(streams) // 2 :]
        rows, lag = query_BHRE.shape[2], len(keys) - 1
        score_BHRF = torch.full((*query_BHRE.shape[:3], lag + 1), -torch.inf, device=query_BHRE.device)
        if rows > lag:
            base, base_lse = flash(*_base(query_BHRE, keys[0], values[0], lag))
            score_BHRF[:, :, lag:, lag] = base_lse
        for offset in range(min(lag, rows)):
            score_BHRF[:, :, offset:, offset] = _score(query_BHRE, keys[lag - offset], offset)
        lse_BHR = score_BHRF.logsumexp(-1)
        weight_BHRF = (score_BHRF - lse_BHR[..., None]).exp()
        out_BHRE = torch.zeros_like(query_BHRE, dtype=torch.float32)
        if rows > lag:
            out_BHRE[:, :, lag:] = weight_BHRF[:, :, lag:, lag:] * base
        for offset in range(min(lag, rows)):
            weight_BHR1 = weight_BHRF[:, :, offset:, offset, None]
            out_BHRE[:, :, offset:].addcmul_(weight_BHR1, values[lag - offset][:, :, : rows - offset].float())
        out_BHRE = out_BHRE.to(query_BHRE.dtype)
        ctx.save_for_backward(query_BHRE, out_BHRE, lse_BHR, weight_BHRF, *streams)
        return out_BHRE

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHRE, out_BHRE, lse_BHR, weight_BHRF, *streams = ctx.saved_tensors
        keys, values = streams[: len(streams) // 2], streams[len(streams) // 2 :]
        (grad_BHRE,) = grads
        rows, lag, scale = query_BHRE.shape[2], len(keys) - 1, query_BHRE.shape[3] ** -0.5
        d_query = torch.zeros_like(query_BHRE, dtype=torch.float32)
        d_keys, d_values = [torch.zeros_like(key) for key in keys], [torch.zeros_like(value) for value in values]
        if rows > lag:
            base = _base(query_BHRE, keys[0], values[0], lag)
            merged = (out_BHRE[:, :, lag:], lse_BHR[:, :, lag:])
            gradients = flash_backward(grad_BHRE[:, :, lag:], *base, *merged)
            d_query[:, :, lag:] = gradients[0]
            d_keys[0][:, :, : rows - lag], d_values[0][:, :, : rows - lag] = gradients[1:]
        grad_BHRE, query_BHRE = grad_BHRE.float(), query_BHRE.float()
        delta_BHR1 = (grad_BHRE * out_BHRE).sum(-1, keepdim=True)
        for offset in range(min(lag, rows)):
            stream, seen = lag - offset, slice(0, rows - offset)
            grad, weight = grad_BHRE[:, :, offset:], weight_BHRF[:, :, offset:, offset, None]
            value, key = values[stream][:, :, seen].float(), keys[stream][:, :, seen].float()
            d_score = weight * ((grad * value).sum(-1, keepdim=True) - delta_BHR1[:, :, offset:]) * scale
            d_values[stream][:, :, seen] = weight * grad
            d_keys[stream][:, :, seen] = d_score * query_BHRE[:, :, offset:]
            d_query[:, :, offset:].addcmul_(d_score, key)
        return (d_query.to(out_BHRE.dtype), *d_keys, *d_values)


def _base(
    query_BHRE: torch.Tensor, key_BHRE: torch.Tensor, value_BHRE: torch.Tensor, lag: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets >= lag are a plain causal square once the first `lag` queries and the last `lag` columns are cut."""
    columns = slice(0, key_BHRE.shape[2] - lag)
    return query_BHRE[:, :, lag:], key_BHRE[:, :, columns], value_BHRE[:, :, columns]


def _score(query_BHRE: torch.Tensor, key_BHRE: torch.Tensor, offset: int) -> torch.Tensor:
    """Scaled scores [B,H,R-offset] of each row with the column `offset` before it."""
    columns = slice(0, key_BHRE.shape[2] - offset)
    product_BHRE = query_BHRE[:, :, offset:].float() * key_BHRE[:, :, columns].float()
    return product_BHRE.sum(-1) * query_BHRE.shape[3] ** -0.5


def _efficient(query_BHRE: torch.Tensor) -> bool:
    """Whether CUDA's flash kernel cannot take this: float32, or a head dimension not a multiple of 8."""
    return query_BHRE.dtype == torch.float32 or query_BHRE.shape[3] % 8 != 0


def flash(
    query_BHRE: torch.Tensor, key_BHRE: torch.Tensor, value_BHRE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with O(R) memory: (out_BHRE, log-sum-exp_BHR in float32)."""
    aten = torch.ops.aten
    if query_BHRE.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query_BHRE, key_BHRE, value_BHRE, 0.0, True)
    if _efficient(query_BHRE):
        found = aten._scaled_dot_product_efficient_attention(query_BHRE, key_BHRE, value_BHRE, None, True, 0.0, True)
        return found[0], found[1][:, :, : query_BHRE.shape[2]]
    found = aten._scaled_dot_product_flash_attention(query_BHRE, key_BHRE, value_BHRE, 0.0, True)
    return found[0], found[1]


def flash_backward(
    grad_BHRE: torch.Tensor,
    query_BHRE: torch.Tensor,
    key_BHRE: torch.Tensor,
    value_BHRE: torch.Tensor,
    out_BHRE: torch.Tensor,
    lse_BHR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given an output and a log-sum-exp that may include other columns."""
    aten = torch.ops.aten
    inputs = (grad_BHRE.contiguous(), query_BHRE, key_BHRE, value_BHRE)
    rows = query_BHRE.shape[2]
    if query_BHRE.device.type == "cpu":
        dtype = query_BHRE.dtype
        wide = torch.float32 if rows < _SHORT and dtype.itemsize == 2 else dtype
        given = [x.to(wide) for x in (*inputs, out_BHRE)]
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse_BHR, 0.0, True)
        return found[0].to(dtype), found[1].to(dtype), found[2].to(dtype)
    unused = torch.zeros((), dtype=torch.int64, device=query_BHRE.device)  # dropout's seed and offset
    if _efficient(query_BHRE):
        padded = torch.nn.functional.pad(lse_BHR, (0, -rows % _ALIGN), value=torch.inf)
        wanted = [True, True, True, False]
        found = aten._scaled_dot_product_efficient_attention_backward(
            *inputs, None, out_BHRE.contiguous(), padded, unused, unused, 0.0, wanted, True
        )
        return found[0], found[1], found[2]
    lengths = (None, None, rows, rows)
    merged = (out_BHRE.contiguous(), lse_BHR.contiguous())
    return aten._scaled_dot_product_flash_attention_backward(*inputs, *merged, *lengths, 0.0, True, unused, unused)
