"""What one row of an unroll step attends to, with O(T) memory per head.

In step F the query of row r sees, under one softmax: offset 0 -> stream F-1, offset 1 -> stream F-2, …, offset F-2 ->
stream 1, and every offset >= F-1 -> stream 0, the target's own features. That is what the F-th drafted token sees when
decoding. HASS's public code multiplies masked scores by 0 and keeps their columns in the softmax; here a masked column
is not in the softmax at all.

Axes: B batch, H attention head, T position (a query's, then a column's), E head dimension, S unroll step whose stream
it is, newest last.
Keys and values are already repeated to H heads. Private ops of torch are confined to `flash` and `flash_backward`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

StreamAttention = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
"""(query_BHTE, keys of each stream, values of each stream) -> out_BHTE."""

_SHORT = 512
"""Rows below which a CPU's 16-bit backward is slower than float32's: 3.7 times at 105 rows, 0.56 at 2,048 (AMX)."""
_ALIGN = 32
"""Rows to which the memory-efficient CUDA kernel pads its log-sum-exp."""


def attend_fast(query_BHTE: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Flash attention over stream 0, merged with one column per later stream."""
    return _Merged.apply(query_BHTE, *keys, *values)


class _Merged(torch.autograd.Function):
    """One softmax over a causal base and F-1 diagonals.

    The flash backward uses the forward only through P = exp(score - lse) and D = sum(dO * O). Given the merged lse and
    the merged output it therefore returns the exact gradients of the base columns; the diagonals' are in closed form.
    """

    @staticmethod
    def forward(ctx: Any, query_BHTE: torch.Tensor, *streams: torch.Tensor) -> torch.Tensor:
        keys, values = streams[: len(streams) // 2], streams[len(streams) // 2 :]
        rows, lag = query_BHTE.shape[2], len(keys) - 1
        score_BHTS = torch.full((*query_BHTE.shape[:3], lag + 1), -torch.inf, device=query_BHTE.device)
        if rows > lag:
            base, base_lse = flash(*_base(query_BHTE, keys[0], values[0], lag))
            score_BHTS[:, :, lag:, lag] = base_lse
        for offset in range(min(lag, rows)):
            score_BHTS[:, :, offset:, offset] = _score(query_BHTE, keys[lag - offset], offset)
        lse_BHT = score_BHTS.logsumexp(-1)
        weight_BHTS = (score_BHTS - lse_BHT[..., None]).exp()
        out_BHTE = torch.zeros_like(query_BHTE, dtype=torch.float32)
        if rows > lag:
            out_BHTE[:, :, lag:] = weight_BHTS[:, :, lag:, lag:] * base
        for offset in range(min(lag, rows)):
            weight_BHT1 = weight_BHTS[:, :, offset:, offset, None]
            out_BHTE[:, :, offset:].addcmul_(weight_BHT1, values[lag - offset][:, :, : rows - offset].float())
        out_BHTE = out_BHTE.to(query_BHTE.dtype)
        ctx.save_for_backward(query_BHTE, out_BHTE, lse_BHT, weight_BHTS, *streams)
        return out_BHTE

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHTE, out_BHTE, lse_BHT, weight_BHTS, *streams = ctx.saved_tensors
        keys, values = streams[: len(streams) // 2], streams[len(streams) // 2 :]
        (grad_BHTE,) = grads
        rows, lag, scale = query_BHTE.shape[2], len(keys) - 1, query_BHTE.shape[3] ** -0.5
        d_query = torch.zeros_like(query_BHTE, dtype=torch.float32)
        d_keys, d_values = [torch.zeros_like(key) for key in keys], [torch.zeros_like(value) for value in values]
        if rows > lag:
            base = _base(query_BHTE, keys[0], values[0], lag)
            merged = (out_BHTE[:, :, lag:], lse_BHT[:, :, lag:])
            gradients = flash_backward(grad_BHTE[:, :, lag:], *base, *merged)
            d_query[:, :, lag:] = gradients[0]
            d_keys[0][:, :, : rows - lag], d_values[0][:, :, : rows - lag] = gradients[1:]
        grad_BHTE, query_BHTE = grad_BHTE.float(), query_BHTE.float()
        delta_BHT1 = (grad_BHTE * out_BHTE).sum(-1, keepdim=True)
        for offset in range(min(lag, rows)):
            stream, seen = lag - offset, slice(0, rows - offset)
            grad, weight = grad_BHTE[:, :, offset:], weight_BHTS[:, :, offset:, offset, None]
            value, key = values[stream][:, :, seen].float(), keys[stream][:, :, seen].float()
            d_score = weight * ((grad * value).sum(-1, keepdim=True) - delta_BHT1[:, :, offset:]) * scale
            d_values[stream][:, :, seen] = weight * grad
            d_keys[stream][:, :, seen] = d_score * query_BHTE[:, :, offset:]
            d_query[:, :, offset:].addcmul_(d_score, key)
        return (d_query.to(out_BHTE.dtype), *d_keys, *d_values)


def _base(
    query_BHTE: torch.Tensor, key_BHTE: torch.Tensor, value_BHTE: torch.Tensor, lag: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets >= lag are a plain causal square once the first `lag` queries and the last `lag` columns are cut."""
    columns = slice(0, key_BHTE.shape[2] - lag)
    return query_BHTE[:, :, lag:], key_BHTE[:, :, columns], value_BHTE[:, :, columns]


def _score(query_BHTE: torch.Tensor, key_BHTE: torch.Tensor, offset: int) -> torch.Tensor:
    """Scaled scores [B,H,T-offset] of each row with the column `offset` before it."""
    columns = slice(0, key_BHTE.shape[2] - offset)
    product_BHTE = query_BHTE[:, :, offset:].float() * key_BHTE[:, :, columns].float()
    return product_BHTE.sum(-1) * query_BHTE.shape[3] ** -0.5


def _efficient(query_BHTE: torch.Tensor) -> bool:
    """Whether CUDA's flash kernel cannot take this: float32, or a head dimension not a multiple of 8."""
    return query_BHTE.dtype == torch.float32 or query_BHTE.shape[3] % 8 != 0


def flash(
    query_BHTE: torch.Tensor, key_BHTE: torch.Tensor, value_BHTE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with O(T) memory: (out_BHTE, log-sum-exp_BHT in float32)."""
    aten = torch.ops.aten
    if query_BHTE.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query_BHTE, key_BHTE, value_BHTE, 0.0, True)
    if _efficient(query_BHTE):
        found = aten._scaled_dot_product_efficient_attention(query_BHTE, key_BHTE, value_BHTE, None, True, 0.0, True)
        return found[0], found[1][:, :, : query_BHTE.shape[2]]
    found = aten._scaled_dot_product_flash_attention(query_BHTE, key_BHTE, value_BHTE, 0.0, True)
    return found[0], found[1]


def flash_backward(
    grad_BHTE: torch.Tensor,
    query_BHTE: torch.Tensor,
    key_BHTE: torch.Tensor,
    value_BHTE: torch.Tensor,
    out_BHTE: torch.Tensor,
    lse_BHT: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given an output and a log-sum-exp that may include other columns."""
    aten = torch.ops.aten
    inputs = (grad_BHTE.contiguous(), query_BHTE, key_BHTE, value_BHTE)
    rows = query_BHTE.shape[2]
    if query_BHTE.device.type == "cpu":
        dtype = query_BHTE.dtype
        wide = torch.float32 if rows < _SHORT and dtype.itemsize == 2 else dtype
        given = [x.to(wide) for x in (*inputs, out_BHTE)]
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse_BHT, 0.0, True)
        return found[0].to(dtype), found[1].to(dtype), found[2].to(dtype)
    unused = torch.zeros((), dtype=torch.int64, device=query_BHTE.device)  # dropout's seed and offset
    if _efficient(query_BHTE):
        padded = torch.nn.functional.pad(lse_BHT, (0, -rows % _ALIGN), value=torch.inf)
        wanted = [True, True, True, False]
        found = aten._scaled_dot_product_efficient_attention_backward(
            *inputs, None, out_BHTE.contiguous(), padded, unused, unused, 0.0, wanted, True
        )
        return found[0], found[1], found[2]
    lengths = (None, None, rows, rows)
    merged = (out_BHTE.contiguous(), lse_BHT.contiguous())
    return aten._scaled_dot_product_flash_attention_backward(*inputs, *merged, *lengths, 0.0, True, unused, unused)
