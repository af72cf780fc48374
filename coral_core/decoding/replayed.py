"""The forwards of a round in fixed shapes, as graphs.py records them: a whole draft, and the target over its tree.

They append to their cache as the plain forwards do, and give the same rows: attention reads more columns, which the
mask hides.
Axes: B batch of one, M tree row, T fed row, D hidden, V vocabulary, L level.
"""

import dataclasses

import torch

from coral_core.decoding import masks, tree
from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.drafting import Drafting
from coral_core.decoding.graphs import columns, padded_rows
from coral_core.decoding.policy.adaptive import Plan
from coral_core.decoding.rounds import Clock
from coral_core.decoding.sampling import Ahead, Picker
from coral_core.decoding.tree import Draft
from coral_core.drafter.model import Drafter
from coral_core.head.candidates import Head
from coral_core.lent import Lent
from coral_core.target.target import Target


def verify(target: Target, cache: SlotCache, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
    """The features [M,D] and logits [M,V] of a tree's rows, which are appended; both are void after the next call."""
    assert cache.graphs is not None
    rows, past = draft.token_M.numel(), cache.length
    if rows != padded_rows(rows):
        draft = tree.filled(draft, padded_rows(rows))
    end = min(columns(past + draft.token_M.numel()), cache.capacity)
    inputs = {
        "token_BM": draft.token_M[None],
        "depth_BM": draft.depth_M[None],
        "sees_BMM": draft.sees_MM[None],
        "past_B1": draft.token_M.new_full((1, 1), past),
    }

    def forward(
        token_BM: torch.Tensor, depth_BM: torch.Tensor, sees_BMM: torch.Tensor, past_B1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        column_M = past_B1[0] + torch.arange(token_BM.shape[1], device=past_B1.device)
        with cache.place(column_M, end):
            feature_BMD = target.forward(
                token_BM.clamp_min(0),
                position_BT=past_B1 + depth_BM,
                mask=masks.for_batch(target, past_B1, depth_BM, sees_BMM, end),
                cache=cache,
            )
        return feature_BMD[0], target.logits(feature_BMD[0])

    feature_MD, logits_MV = cache.graphs.run(("verify", target.taps, draft.token_M.numel(), end), forward, inputs)
    cache.length = past + rows
    return feature_MD[:rows], logits_MV[:rows]


def drafting(drafter: Drafter, lent: Lent, head: Head, plan: Plan, slots: Slots | SlotCache) -> Drafting:
    """The drafting of one answer, recorded where all of it can be: one shape of tree, a head that waits for nothing."""
    recorded = slots.graphs is not None and head.recordable and plan.shape is not None
    return (_Recorded if recorded else Drafting)(drafter, lent, head, plan, slots)


class _Recorded(Drafting):
    """A draft is one recording: the accepted rows, filled up to the longest path, then every level of the tree."""

    def draft(self, token_T: torch.Tensor, feature_TD: torch.Tensor, picker: Picker, clock: Clock) -> Draft:
        slots, plan, rows = self.slots, self.plan, self.plan.depth + 1
        assert slots.graphs is not None
        if token_T.numel() > rows:  # a prompt, or plain steps
            self.feed(token_T[:-1], feature_TD[:-1])
            token_T, feature_TD = token_T[-1:], feature_TD[-1:]
        past, fed = slots.length, token_T.numel()
        most = max(rows, fed + (plan.depth - 1) * plan.topk)
        end = min(columns(past + most), slots.capacity)
        ahead = self.ahead(picker, past + fed)
        sampler = ahead.sampler and dataclasses.replace(ahead.sampler, repetition_penalty=1.0, seed=0)
        inputs = {
            "token_T": torch.nn.functional.pad(token_T, (0, rows - fed)),
            "feature_TD": torch.nn.functional.pad(feature_TD, (0, 0, 0, rows - fed)),
            "past_1": token_T.new_full((1,), past),
            "fed_1": token_T.new_full((1,), fed),
        }
        if ahead.noise_LV is not None:
            inputs["noise_LV"] = ahead.noise_LV

        def call(
            token_T: torch.Tensor,
            feature_TD: torch.Tensor,
            past_1: torch.Tensor,
            fed_1: torch.Tensor,
            noise_LV: torch.Tensor | None = None,
        ) -> Draft:
            column_T = past_1 + torch.arange(rows, device=past_1.device)
            sees_TK = column_T[:, None] >= torch.arange(end, device=past_1.device)
            with slots.place(column_T, end):
                turn = self.drafter.rope(column_T[None], feature_TD.dtype)
                hidden_TD = self.layer(token_T, self.drafter.read(feature_TD), turn, sees_TK)
            root_1, hidden_1D = token_T[fed_1 - 1], hidden_TD[fed_1 - 1]
            draft = self.grow(root_1, hidden_1D, past_1 + fed_1, Ahead(sampler, noise_LV), Clock(), end)
            return tree.filled(draft, padded_rows(draft.token_M.numel()))

        # Drafter and head are kept alive by the recording, and with them their numbers their own.
        key = ("draft", id(self.drafter), id(self.head), plan.shape, sampler, end)
        draft: Draft = slots.graphs.run(key, call, inputs)
        slots.length = past + fed
        clock.lap("draft")
        return draft
