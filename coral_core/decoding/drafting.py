"""Growing one draft with the drafter and its cache.

The drafter's cache holds a row per committed position, then, while a tree grows, a row per expanded node; those are
cut again when the draft is done, because verified features replace drafted ones (EAGLE-2).
Several answers are drafted for at once, with a tree each: only the networks see a batch.
Axes: B batch: a seat each, T position, D hidden, V vocabulary, N row: a node of a beam, or of the widest beam, R place
in a list of proposed tokens, C candidate token, K cached column of the drafter, H attention head, J key/value head, E
head dimension.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from coral_core.decoding import tree
from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.policy.plan import Plan
from coral_core.decoding.rounds import Clock
from coral_core.decoding.sampling import Ahead, Picker
from coral_core.drafter.blocks import CosSin
from coral_core.drafter.model import Drafter
from coral_core.head.heads import Candidates, Head
from coral_core.kernels.attention import grouped
from coral_core.lent import Lent

PREFILL_ROWS = 1024
"""Prompt rows of one forward pass: a long prompt must not spike memory."""
FEW_ROWS = 16
"""Rows that a batch feeds together, for each answer at most; a prompt is fed alone."""


class Drafting:
    """The drafter, its head and its cache, for one answer."""

    def __init__(self, drafter: Drafter, lent: Lent, head: Head, plan: Plan, slots: Slots | SlotCache) -> None:
        self.drafter, self.lent, self.head, self.plan = drafter, lent, head, plan
        self.slots = slots

    def draft(self, token_T: torch.Tensor, feature_TD: torch.Tensor, picker: Picker, clock: Clock) -> tree.Draft:
        """Append committed rows (token t+1, feature t), and draft a tree below the last token."""
        hidden_1D = self.feed(token_T, feature_TD)
        committed = self.slots.length
        return self.grow(token_T[-1:], hidden_1D, committed, self.ahead(picker, committed), clock)

    def ahead(self, picker: Picker, committed: int) -> Ahead:
        """What is known of the picks for the levels of a tree; the root is the last of `committed` rows' tokens."""
        head_VD = self.lent.head_VD
        return picker.ahead(committed + 1, self.plan.depth, head_VD.shape[0], head_VD.device)

    def feed(self, token_T: torch.Tensor, feature_TD: torch.Tensor) -> torch.Tensor:
        """Append committed rows (token t+1, feature t); the drafted feature [1,D] after the last of them.

        In chunks, as the target's prefill: the mask of a whole prompt grows with its square.
        """
        hidden_TD = feature_TD
        for tokens_T, features_TD in zip(token_T.split(PREFILL_ROWS), feature_TD.split(PREFILL_ROWS), strict=True):
            past, new = self.slots.length, tokens_T.numel()
            position_T = torch.arange(past, past + new, device=token_T.device)
            sees_TK = position_T[:, None] >= torch.arange(past + new, device=token_T.device) if new > 1 else None
            cos_sin = self.drafter.rope(position_T[None], features_TD.dtype)
            hidden_TD = self.layer(tokens_T, self.drafter.read(features_TD), cos_sin, sees_TK)
        return hidden_TD[-1:]

    def grow(
        self,
        root_1: torch.Tensor,
        hidden_1D: torch.Tensor,
        committed: int | torch.Tensor,
        ahead: Ahead,
        clock: Clock,
        columns: int | None = None,
    ) -> tree.Draft:
        """Draft a tree below the root, from the drafted feature that follows it; the cache's length stays.

        Where the number of committed rows is one [1] on the device, as many columns are read as are given.
        """
        plan, drafted, hidden_ND = self.plan, 0, hidden_1D
        most = (plan.depth - 1) * plan.topk
        columns_N = torch.arange(most, device=root_1.device) + committed
        cos_11TE, sin_11TE = self.drafter.rope(columns_N[None, : plan.depth - 1], hidden_1D.dtype)
        sees_K = tree.committed(committed, int(committed) + most if columns is None else columns, hidden_1D)
        logprob_1R, token_1R = self.propose(hidden_1D, ahead, 0, clock)
        beam = tree.first_level(logprob_1R[0], token_1R[0], plan.topk, sees_K)
        for level in range(1, plan.depth):
            if (width := plan.width(beam.score_N)) == 0:
                break
            column_N = columns_N[drafted : drafted + width]
            beam = tree.narrow(beam, width)
            tree.give_columns(beam, column_N)
            drafted += width
            end = int(committed) + drafted if columns is None else columns
            cos_sin = cos_11TE[:, :, level - 1 : level], sin_11TE[:, :, level - 1 : level]
            with self.slots.place(column_N, end):
                hidden_ND = self.layer(beam.token_N, hidden_ND[beam.row_N], cos_sin, beam.sees_NK[:, :end])
            logprob_NR, token_NR = self.propose(hidden_ND, ahead, level, clock)
            beam = tree.extend(beam, logprob_NR, token_NR, plan.topk)
        return tree.rerank(beam, root_1, plan.count)

    def propose(
        self, hidden_ND: torch.Tensor, ahead: Ahead, level: int, clock: Clock
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For each drafted feature, the tokens that the target will most likely pick there: [N,R] twice."""
        with clock.phase("head"):
            found = self.head.candidates(self.drafter.hidden(hidden_ND))
            logprob_NC = ahead.rank(level, found.logit_NC, found.token_C)
            logprob_NR, token_NR = Candidates(logprob_NC, found.token_C).best(self.plan.topk)
        return (logprob_NR + self.plan.shift).clamp_max(0) if self.plan.shift else logprob_NR, token_NR

    def layer(
        self, token_T: torch.Tensor, feature_TD: torch.Tensor, cos_sin: CosSin, sees_TK: torch.Tensor | None
    ) -> torch.Tensor:
        """The drafted features [T,D] of new rows, which the cache takes in; `cos_sin` is `rope` of their positions.

        Without `sees_TK` each sees all rows.
        """

        def attend(query_BHTE: torch.Tensor, key_BJTE: torch.Tensor, value_BJTE: torch.Tensor) -> torch.Tensor:
            key_BJKE, value_BJKE = self.slots.update(key_BJTE, value_BJTE)
            return grouped(query_BHTE, key_BJKE, value_BJKE, sees_TK)

        embed_BTD = self.lent.embed(token_T)[None]
        return self.drafter(embed_BTD, feature_TD[None], cos_sin, attend)[0]


@dataclasses.dataclass(frozen=True)
class DraftInput:
    """What a draft of a batch begins from: one answer's rows that the drafter has not read, and its plan."""

    drafting: Drafting
    """Over a seat of the batch's cache."""
    seat: int
    token_T: torch.Tensor
    feature_TD: torch.Tensor
    picker: Picker
    plan: Plan


class BatchDrafting:
    """The drafts of several answers, a level at a time: one pass of the drafter and of the head for all of them."""

    def __init__(self, inputs: Sequence[DraftInput]) -> None:
        first = inputs[0].drafting
        assert isinstance(first.slots, SlotCache) and first.slots.whole is not None, "a batch shares a cache"
        self.drafter, self.lent, self.head, self.cache = first.drafter, first.lent, first.head, first.slots.whole
        self.inputs, self.device = inputs, self.lent.head_VD.device
        seats = [own.seat for own in inputs]
        self.seat_B = None if seats == list(range(len(seats))) else torch.tensor(seats, device=self.device)
        self.topk = max(own.plan.topk for own in inputs)

    def draft(self) -> list[tree.Draft]:
        """As `Drafting.draft`, for each input."""
        return self._grow_all(self._feed_all())

    def _feed_all(self) -> torch.Tensor:
        """Append each answer's committed rows; the drafted feature [B,D] after the last of them.

        Shorter ones are filled up with their last row, written again to the same place.
        """
        tokens, features = [], []
        for own in self.inputs:
            token_T, feature_TD = own.token_T, own.feature_TD
            if token_T.numel() > FEW_ROWS:
                own.drafting.feed(token_T[:-1], feature_TD[:-1])
                token_T, feature_TD = token_T[-1:], feature_TD[-1:]
            tokens.append(token_T)
            features.append(feature_TD)
        past, new = self._committed(), [token_T.numel() for token_T in tokens]
        widest = max(new)
        index_BT = torch.arange(widest, device=self.device).minimum(torch.tensor(new, device=self.device)[:, None] - 1)
        column_BT = torch.tensor(past, device=self.device)[:, None] + index_BT
        token_BT = pad_sequence(tokens, batch_first=True).gather(1, index_BT)
        feature_BTD = pad_sequence(features, batch_first=True).take_along_dim(index_BT[..., None], dim=1)
        sees_BTK = torch.arange(max(map(sum, zip(past, new, strict=True))), device=self.device) <= column_BT[:, :, None]
        hidden_BTD = self._forward(token_BT, self.drafter.read(feature_BTD), column_BT, column_BT, sees_BTK)
        for own, rows in zip(self.inputs, new, strict=True):
            own.drafting.slots.length += rows
        return hidden_BTD[:, -1]

    def _committed(self) -> list[int]:
        return [own.drafting.slots.length for own in self.inputs]

    def _grow_all(self, hidden_BD: torch.Tensor) -> list[tree.Draft]:
        """A tree below each root, from the drafted feature that follows it."""
        past, inputs = self._committed(), self.inputs
        vocab = self.lent.head_VD.shape[0]
        aheads = [
            own.picker.ahead(rows + 1, own.plan.depth, vocab, self.device)
            for own, rows in zip(inputs, past, strict=True)
        ]
        columns = max(past) + max(own.plan.depth for own in inputs) * self.topk
        proposed = zip(inputs, past, *self._propose(hidden_BD, aheads, [1] * len(inputs), 0), strict=True)
        beams = [
            tree.first_level(logprob_1R[0], token_1R[0], own.plan.topk, tree.committed(rows, columns, hidden_BD))
            for own, rows, logprob_1R, token_1R in proposed
        ]
        firsts, starts, hidden_ND = past, list(range(len(inputs))), hidden_BD
        for level in range(1, max(own.plan.depth for own in inputs)):
            beams = [self._narrow(own, beam, level) for own, beam in zip(inputs, beams, strict=True)]
            widths = [beam.token_N.numel() for beam in beams]
            if not any(widths):
                break
            feature_ND = torch.cat([hidden_ND[start + beam.row_N] for start, beam in zip(starts, beams, strict=True)])
            for first, width, beam in zip(firsts, widths, beams, strict=True):
                tree.give_columns(beam, torch.arange(first, first + width, device=self.device))
            hidden_ND = self._level(beams, feature_ND, firsts, [rows - 1 + level for rows in past])
            proposals = zip(inputs, beams, *self._propose(hidden_ND, aheads, widths, level), strict=True)
            beams = [
                tree.extend(beam, logprob_NR, token_NR, own.plan.topk) if len(token_NR) else beam
                for own, beam, logprob_NR, token_NR in proposals
            ]
            starts = [sum(widths[:seat]) for seat in range(len(widths))]
            firsts = [first + width for first, width in zip(firsts, widths, strict=True)]
        return [tree.rerank(beam, own.token_T[-1:], own.plan.count) for own, beam in zip(inputs, beams, strict=True)]

    def _narrow(self, own: DraftInput, beam: tree.Beam, level: int) -> tree.Beam:
        wide = level < own.plan.depth and beam.token_N.numel()
        return tree.narrow(beam, own.plan.width(beam.score_N) if wide else 0)

    def _propose(
        self, hidden_ND: torch.Tensor, aheads: list[Ahead], widths: list[int], level: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`Drafting.propose` for all answers, each with its number of rows."""
        found = self.head.candidates(self.drafter.hidden(hidden_ND))
        if all(ahead.noise_TV is None and ahead.sampler == aheads[0].sampler for ahead in aheads):
            logprob_NC = aheads[0].rank(level, found.logit_NC, found.token_C)
        else:
            tokens = [found.token_C] * len(aheads) if found.token_C.dim() == 1 else found.token_C.split(widths)
            parts = zip(aheads, found.logit_NC.split(widths), tokens, strict=True)
            logprob_NC = torch.cat([ahead.rank(level, logit_NC, token_C) for ahead, logit_NC, token_C in parts])
        logprob_NR, token_NR = Candidates(logprob_NC, found.token_C).best(self.topk)
        shifted = [
            (part_NR + own.plan.shift).clamp_max(0) if own.plan.shift else part_NR
            for own, part_NR in zip(self.inputs, logprob_NR.split(widths), strict=True)
        ]
        return shifted, list(token_NR.split(widths))

    def _level(
        self, beams: list[tree.Beam], feature_ND: torch.Tensor, firsts: list[int], position: list[int]
    ) -> torch.Tensor:
        """The drafted features [N,D] of all beams' nodes: for each seat, its first column and its nodes' position."""
        device, widths = self.device, [beam.token_N.numel() for beam in beams]
        valid_BN = torch.arange(max(widths), device=device) < torch.tensor(widths, device=device)[:, None]
        token_BN = torch.zeros(valid_BN.shape, dtype=torch.long, device=device)
        token_BN[valid_BN] = torch.cat([beam.token_N for beam in beams])
        feature_BND = feature_ND.new_zeros(*valid_BN.shape, feature_ND.shape[1])
        feature_BND[valid_BN] = feature_ND
        column_BN = torch.tensor(firsts, device=device)[:, None] + torch.arange(max(widths), device=device)
        sees_BNK = pad_sequence([beam.sees_NK for beam in beams], batch_first=True)[:, :, : max(firsts) + max(widths)]
        position_B1 = torch.tensor(position, device=device)[:, None]
        return self._forward(token_BN, feature_BND, position_B1, column_BN, sees_BNK)[valid_BN]

    def _forward(
        self,
        token_BT: torch.Tensor,
        feature_BTD: torch.Tensor,
        position_BT: torch.Tensor,
        column_BT: torch.Tensor,
        sees_BTK: torch.Tensor,
    ) -> torch.Tensor:
        def attend(query_BHTE: torch.Tensor, key_BJTE: torch.Tensor, value_BJTE: torch.Tensor) -> torch.Tensor:
            key_BJKE, value_BJKE = self.cache.update(key_BJTE, value_BJTE)
            return grouped(query_BHTE, key_BJKE, value_BJKE, sees_BTK[:, None])

        cos_sin = self.drafter.rope(position_BT, feature_BTD.dtype)
        with self.cache.place(column_BT, sees_BTK.shape[-1], self.seat_B):
            return self.drafter(self.lent.embed(token_BT), feature_BTD, cos_sin, attend)
