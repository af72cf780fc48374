"""Tapping features: the target's last hidden state after its final norm, which is what its LM head reads.

Axes: B batch, T position, D hidden, I input width: the taps side by side.
"""

import dataclasses

import torch

from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True)
class Capture:
    """The features of a batch of dialogues; rows past a dialogue's end mean nothing."""

    feature_BTD: torch.Tensor
    tap_BTI: torch.Tensor | None = None
    """The inputs of the layers that the target is `tapping`, side by side."""

    @classmethod
    def of(cls, target: Target, given_BTI: torch.Tensor) -> "Capture":
        """The parts of what `target.forward` gives."""
        width = target.lent.head_VD.shape[1]
        return cls(given_BTI[..., -width:], given_BTI[..., :-width] if target.taps else None)


@torch.no_grad()
def tap(target: Target, ids_BT: torch.Tensor, valid_BT: torch.Tensor) -> Capture:
    """One forward over right-padded dialogues, no cache.

    Causal attention alone keeps a real row from seeing the padding to its right, so the target gets no padding mask;
    a test compares with one-by-one forwards. `valid_BT` only guards that the padding is indeed on the right.
    """
    assert bool((valid_BT[:, 1:] <= valid_BT[:, :-1]).all()), "padding must be on the right"
    return Capture.of(target, target.forward(ids_BT.to(target.device)))
