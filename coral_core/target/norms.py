"""The plug-in that gives a target's norms their short form (kernels/norm.py).

Axes: D hidden.
"""

from typing import Any

import torch
from torch import nn

from coral_core.kernels.norm import scaled_norm

DIFFERENT = 0.05
"""Of the outputs, in bfloat16, the most that may differ. With sums in float64 none of 4,096 did; where a norm rounds
elsewhere (OLMo 2 in 16 bits) it is one in four."""


class ShortNorm(nn.Module):
    """A norm of transformers in its short form, on the same weight."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return scaled_norm(hidden_states, self.weight, self.variance_epsilon)


@torch.no_grad()
def plug_in(model: Any) -> None:
    """Shorten the norms that answer as Llama's does. Others, such as Gemma's, whose weight is an offset, stay."""
    for module in model.modules():
        named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        if not named or not isinstance(weight_D := getattr(module, "weight", None), nn.Parameter):
            continue
        x_1D = torch.linspace(-2, 2, weight_D.numel()).to(weight_D)[None]
        own_1D, short_1D = module(x_1D).bfloat16(), scaled_norm(x_1D, weight_D, module.variance_epsilon).bfloat16()
        if (own_1D != short_1D).float().mean() <= DIFFERENT:
            module.__class__ = ShortNorm
