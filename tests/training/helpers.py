"""Tiny drafters and batches for the training tests."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.lent import Lent
from coral_core.recipe.schema import PRESETS, UNSET, TrainSpec
from coral_core.store.batches import Batch
from coral_core.store.shard import Sample
from coral_core.store.store import Store
from tests.store.helpers import make_store

HIDDEN, VOCABULARY = 32, 48


TAPS = (1, 2, 4)


def tiny_drafter(seed: int = 0, heads: int = 4, kv_heads: int = 2, **changes: Any) -> Drafter:
    """A random drafter, 32 wide, with grouped-query heads; no weight is where training would start it."""
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
        **changes,
    )
    drafter = Drafter(config)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else noise / parameter.shape[1] ** 0.5)
    return drafter


def tiny_lent(seed: int = 1, **scalars: float) -> Lent:
    """An untied embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    return Lent(*weights, **scalars)


def tiny_batch(lengths: list[int], answers: list[tuple[int, int]], pad_to: int = 0, seed: int = 2) -> Batch:
    """Random sequences, right-padded; `answers` are the [start, end) of each one's answer tokens.

    Padding is loud: features and taps of 1e3, so that a leak shows. Content does not depend on the padding.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, pad_to)
    batch = Batch(
        torch.zeros(len(lengths), width, dtype=torch.int64),
        torch.zeros(len(lengths), width, dtype=torch.bool),
        torch.zeros(len(lengths), width, dtype=torch.bool),
        torch.full((len(lengths), width, HIDDEN), 1e3),
        torch.full((len(lengths), width, 3 * HIDDEN), 1e3),
    )
    for row, (length, (start, end)) in enumerate(zip(lengths, answers, strict=True)):
        batch.ids_BT[row, :length] = torch.randint(VOCABULARY, (length,), generator=generator)
        batch.answer_BT[row, start:end] = True
        batch.valid_BT[row, :length] = True
        batch.feature_BTD[row, :length] = torch.randn(length, HIDDEN, generator=generator)
    for row, length in enumerate(lengths):
        batch.tap_BTI[row, :length] = torch.randn(length, 3 * HIDDEN, generator=generator)
    return batch


def tiny_store(folder: Path, samples: int = 12, holdout: int = 0, *, taps: bool = False) -> Store:
    """A published store for `tiny_drafter`'s shape: dialogues of 4 to 17 tokens, the second half of each an answer."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(samples):
        length = int(torch.randint(4, 18, (), generator=generator))
        ids_T = torch.randint(VOCABULARY, (length,), generator=generator)
        feature_TD = torch.randn(length, HIDDEN, generator=generator)
        tap_TI = 5 * torch.randn(length, 3 * HIDDEN, generator=generator) if taps else None
        made.append(Sample(ids_T, torch.arange(length) >= length // 2, feature_TD, tap_TI))
    facts: dict[str, Any] = {"drafter_config": dataclasses.asdict(tiny_drafter().config)}
    if taps:
        facts["taps"] = list(TAPS)
    return make_store(folder, made, lent=tiny_lent(), facts=facts, holdout=holdout)


def tiny_spec(**changes: Any) -> TrainSpec:
    """Ten short steps of CORAL, all passes from the first."""
    keys = {"steps": 10, "batch_size": 4, "warmup_steps": 3, "learning_rate": 3e-3, "checkpoint_every": 5}
    return TrainSpec(**{**UNSET, **PRESETS["coral"], **keys, **changes})
