"""Attention in torch in place of an engine's, which reads a cache that only its server has."""

import torch


class Causal(torch.nn.Module):
    """Rows of one sequence: query, key and value with their heads side by side."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def forward(self, query, key, value, *_, **__):
        """The output, its heads side by side too."""
        counts = (self.heads, self.kv_heads, self.kv_heads)
        parts = [x.reshape(1, len(x), n, -1).transpose(1, 2) for x, n in zip((query, key, value), counts, strict=True)]
        out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(len(query), -1)


def stand_in(model) -> None:
    """Let a drafter of an engine run on a CPU: torch's attention, and of other layers the engine's form in torch."""
    attention = model.model.layers[0].self_attn
    attention.attn = Causal(attention.num_heads, attention.num_kv_heads, attention.head_dim)
    for module in model.modules():
        if hasattr(module, "forward_native"):
            module._forward_method = module.forward_native
