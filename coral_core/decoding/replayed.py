"""The forwards of a round in fixed shapes, as graphs.py records them: the target over a tree, the drafter over a level,
its head.

They append to their cache as the plain forwards do, and give the same rows: attention reads more columns, which the
mask hides.
Axes: B batch of one, M tree row, T new row of the drafter, N the same after its layer, D hidden, V vocabulary, K cached
column.
"""

from collections.abc import Callable

import torch

from coral_core.decoding import masks, tree
from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.graphs import columns, padded_rows
from coral_core.decoding.tree import Draft
from coral_core.head.candidates import Candidates, Head
from coral_core.target.load import Target

LEVEL_ROWS = 32
"""Drafter rows up to which a forward is recorded: levels and accepted paths; a prompt is read once."""


def verify(target: Target, cache: SlotCache, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
    """The features [M,D] and logits [M,V] of a tree's rows, which are appended; both are void after the next call."""
    assert cache.graphs is not None
    rows, past = draft.token_M.numel(), cache.length
    padded = tree.pad([draft], padded_rows(rows))
    end = min(columns(past + padded.token_M.shape[1]), cache.capacity)
    inputs = {
        "token_BM": padded.token_M.clamp_min(0),
        "depth_BM": padded.depth_M,
        "sees_BMM": padded.sees_MM,
        "past_B1": torch.full((1, 1), past, device=target.device),
    }

    def forward(
        token_BM: torch.Tensor, depth_BM: torch.Tensor, sees_BMM: torch.Tensor, past_B1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        column_M = past_B1[0] + torch.arange(token_BM.shape[1], device=past_B1.device)
        with cache.place(column_M, end):
            feature_BMD = target.forward(
                token_BM,
                position_BT=(past_B1 + depth_BM).clamp_max(target.max_positions - 1),
                mask=masks.for_batch(target, past_B1, depth_BM, sees_BMM, end),
                cache=cache,
            )
        return feature_BMD[0], target.lent.logits(feature_BMD[0])

    feature_MD, logits_MV = cache.graphs.run(("verify", padded.token_M.shape[1], end), forward, inputs)
    cache.length = past + rows
    return feature_MD[:rows], logits_MV[:rows]


def level(
    slots: Slots,
    layer: Callable[..., torch.Tensor],
    owner: object,
    inputs: dict[str, torch.Tensor],
    sees_TK: torch.Tensor | None,
) -> torch.Tensor:
    """`layer(**inputs, sees_TK=…)` over rows that are appended; what it returns is void after the next call.

    `owner` is whose layer it is: two drafters over one cache have recordings of their own. `sees_TK` covers the rows
    held and the new ones; None lets every new row see all of them.
    """
    assert slots.graphs is not None
    past, rows = slots.length, inputs["token_T"].numel()
    end = min(columns(past + rows), slots.capacity)
    column_T = torch.arange(past, past + rows, device=inputs["token_T"].device)
    whole_TK = torch.zeros(rows, end, dtype=torch.bool, device=column_T.device)
    whole_TK[:, : past + rows] = True if sees_TK is None else sees_TK

    def forward(column_T: torch.Tensor, **recorded: torch.Tensor) -> torch.Tensor:
        with slots.place(column_T, end):
            return layer(**recorded)

    key = ("level", id(owner), rows, end)  # the recording keeps the owner alive, and with it the number its own
    hidden_ND: torch.Tensor = slots.graphs.run(key, forward, {**inputs, "sees_TK": whole_TK, "column_T": column_T})
    slots.length = past + rows
    return hidden_ND


def candidates(slots: Slots, head: Head, hidden_ND: torch.Tensor) -> Candidates:
    """`head.candidates`, recorded where the head can be; void after the next call."""
    if slots.graphs is None or not getattr(head, "recordable", False):
        return head.candidates(hidden_ND)
    key = ("head", id(head), hidden_ND.shape[0])
    found: Candidates = slots.graphs.run(key, head.candidates, {"hidden_ND": hidden_ND})
    return found
