"""Tiny drafters and batches for the training tests. Axes: B batch, T position, D hidden, V vocabulary."""

import dataclasses

import torch

from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.lent import Lent

HIDDEN, VOCABULARY = 32, 48


def tiny_drafter(seed: int = 0, heads: int = 4, kv_heads: int = 2) -> Drafter:
    """A random drafter, 32 wide, with grouped-query heads; norm weights away from one."""
    torch.manual_seed(seed)
    config = DrafterConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    drafter = Drafter(config)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(1.5).add_(torch.randn_like(parameter) * 0.05)
    return drafter


def tiny_lent(seed: int = 1, **scalars: float) -> Lent:
    """An untied embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    return Lent(*weights, **scalars)


@dataclasses.dataclass(frozen=True)
class TinyBatch:
    """What store.Batch holds."""

    ids_BT: torch.Tensor
    answer_BT: torch.Tensor
    valid_BT: torch.Tensor
    feature_BTD: torch.Tensor


def tiny_batch(lengths: list[int], answers: list[tuple[int, int]], pad_to: int = 0, seed: int = 2) -> TinyBatch:
    """Random sequences, right-padded; `answers` are the [start, end) of each one's answer tokens.

    Padding is loud: features of 1e3, so that a leak shows. Content does not depend on the padding.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, pad_to)
    batch = TinyBatch(
        torch.zeros(len(lengths), width, dtype=torch.int64),
        torch.zeros(len(lengths), width, dtype=torch.bool),
        torch.zeros(len(lengths), width, dtype=torch.bool),
        torch.full((len(lengths), width, HIDDEN), 1e3),
    )
    for row, (length, (start, end)) in enumerate(zip(lengths, answers, strict=True)):
        batch.ids_BT[row, :length] = torch.randint(VOCABULARY, (length,), generator=generator)
        batch.answer_BT[row, start:end] = True
        batch.valid_BT[row, :length] = True
        batch.feature_BTD[row, :length] = torch.randn(length, HIDDEN, generator=generator)
    return batch
