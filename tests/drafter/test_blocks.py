"""The blocks of the drafter's layer."""

import copy

import torch

from tests.tiny import tiny_drafter, tiny_target


def test_a_rounded_drafter_turns_heads_by_the_same_angles() -> None:
    """`Drafter.to(bfloat16)` once rounded the frequencies too: for pico 0.2 radian too far at position 500."""
    exact = tiny_drafter(tiny_target("llama"))
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    assert rounded.fc.weight.dtype == torch.bfloat16
    position_BT = torch.tensor([[0, 100, 500, 30_000]])
    for own, other in zip(
        exact.rope(position_BT, torch.float32), rounded.rope(position_BT, torch.float32), strict=True
    ):
        assert torch.equal(own, other)
