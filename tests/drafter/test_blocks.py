"""The blocks of the drafter's layer."""

import copy

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from coral_core.drafter.blocks import Rope, rotate
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


def test_heads_turn_as_llamas_do() -> None:
    config = LlamaConfig(head_dim=8, hidden_size=32, num_attention_heads=4)
    position_BT = torch.tensor([[0, 1, 7, 300]])
    query_BHTE, key_BJTE = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 4, 8)
    cos_BTE, sin_BTE = LlamaRotaryEmbedding(config)(query_BHTE, position_BT)
    turn = Rope(config)(position_BT, torch.float32)
    for own, expected in zip(
        (query_BHTE, key_BJTE), apply_rotary_pos_emb(query_BHTE, key_BJTE, cos_BTE, sin_BTE), strict=True
    ):
        torch.testing.assert_close(rotate(own, *turn), expected, rtol=0, atol=1e-6)
