"""Growing one draft with the drafter and its cache.

The drafter's cache holds a row per committed position, then, while a tree grows, a row per expanded node; those are
cut again when the draft is done, because verified features replace drafted ones (EAGLE-2).
Several answers are drafted for at once, with a tree each: only the networks see a batch.
Axes: B seat, T position, D hidden, L level, N beam node, W beam node of the widest beam, R proposed token, S drafted
row, C candidate, K cached row, H query head, G key/value head, E head dimension.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from coral_core.decoding import masks, tree
from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.policy.adaptive import Plan
from coral_core.decoding.rounds import PREFILL_ROWS, Clock
from coral_core.decoding.sampling import Ahead, Picker
from coral_core.decoding.verify import Verdict
from coral_core.drafter.blocks import Turn
from coral_core.drafter.model import Drafter
from coral_core.head.candidates import Candidates, Head
from coral_core.head.full import FullHead
from coral_core.head.static import StaticHead
from coral_core.kernels.attention import grouped
from coral_core.lent import Lent


def whole_head(drafter: Drafter, lent: Lent) -> Head:
    """Every row that the drafter can draft: of an LM head of its own, if it has one, or of the target's."""
    if not drafter.config.draft_vocab_size:
        return FullHead(lent)
    return StaticHead(lent, drafter.draft_tokens, drafter.lm_head.weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeShape:
    """How large a draft is: true numbers of levels, nodes, and nodes expanded per level.

    As a plan, every draft is this large; where a tree is chosen by what it costs (policy/), these are its bounds.
    """

    depth: int
    nodes: int
    topk: int
    confidence: float = 0.0
    """Nodes whose path the drafter believes in less than this are neither expanded nor verified."""

    @property
    def rows(self) -> int:
        """Rows of the drafter's cache that a growing draft takes, at most."""
        return self.depth * self.topk

    @property
    def floor(self) -> float:
        """The confidence as a score."""
        return math.log(self.confidence) if self.confidence else -math.inf

    @property
    def shift(self) -> float:
        return 0.0

    @property
    def shape(self) -> "TreeShape | None":
        return None if self.confidence else self

    def drafts(self) -> bool:
        return self.nodes > 0

    def width(self, score_N: torch.Tensor) -> int:
        return int((score_N >= self.floor).sum()) if self.confidence else score_N.numel()

    def count(self, score_N: torch.Tensor) -> int:
        return min(self.nodes, self.width(score_N))

    def learn(self, draft: tree.Draft, verdict: Verdict) -> None:
        """A fixed tree learns nothing."""


ROOT_ONLY = TreeShape(depth=0, nodes=0, topk=0)
"""The plan of plain decoding."""
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
        clock.lap("draft")
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
            turn = self.drafter.rope(position_T[None], features_TD.dtype)
            hidden_TD = self.layer(tokens_T, self.drafter.read(features_TD), turn, sees_TK)
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
        column_S = torch.arange(most, device=root_1.device) + committed
        cos_11LE, sin_11LE = self.drafter.rope(column_S[None, : plan.depth - 1], hidden_1D.dtype)
        sees_K = masks.committed(committed, int(committed) + most if columns is None else columns, hidden_1D)
        clock.lap("other")
        logprob_1R, token_1R = self.propose(hidden_1D, ahead, 0)
        clock.lap("head")
        beam = tree.plant(logprob_1R[0], token_1R[0], plan.topk, sees_K)
        for level in range(1, plan.depth):
            if (width := plan.width(beam.score_N)) == 0:
                break
            column_N = column_S[drafted : drafted + width]
            beam = tree.narrow(beam, width)
            tree.settle(beam, column_N)
            drafted += width
            end = int(committed) + drafted if columns is None else columns
            turn = cos_11LE[:, :, level - 1 : level], sin_11LE[:, :, level - 1 : level]
            clock.lap("other")
            with self.slots.place(column_N, end):
                hidden_ND = self.layer(beam.token_N, hidden_ND[beam.row_N], turn, beam.sees_NK[:, :end])
            clock.lap("draft")
            logprob_NC, token_NC = self.propose(hidden_ND, ahead, level)
            clock.lap("head")
            beam = tree.extend(beam, logprob_NC, token_NC, plan.topk)
        draft = tree.rerank(beam, root_1, plan.count)
        clock.lap("other")
        return draft

    def propose(self, hidden_ND: torch.Tensor, ahead: Ahead, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each drafted feature, the tokens that the target will most likely pick there: [N,R] twice."""
        found = self.head.candidates(self.drafter.hidden(hidden_ND))
        logprob_NC = ahead.rank(level, found.logit_NC, found.token_C)
        logprob_NR, token_NR = Candidates(logprob_NC, found.token_C).best(self.plan.topk)
        return (logprob_NR + self.plan.shift).clamp_max(0) if self.plan.shift else logprob_NR, token_NR

    def layer(
        self, token_T: torch.Tensor, feature_TD: torch.Tensor, turn: Turn, sees_TK: torch.Tensor | None
    ) -> torch.Tensor:
        """The drafted features [T,D] of new rows, which the cache takes in; `turn` is `rope` of their positions.

        Without `sees_TK` each sees all rows.
        """

        def attend(query_BHTE: torch.Tensor, key_BGTE: torch.Tensor, value_BGTE: torch.Tensor) -> torch.Tensor:
            key_BGKE, value_BGKE = self.slots.update(key_BGTE, value_BGTE)
            return grouped(query_BHTE, key_BGKE, value_BGKE, sees_TK)

        embed_BTD = self.lent.embed(token_T)[None]
        return self.drafter(embed_BTD, feature_TD[None], turn, attend)[0]


@dataclasses.dataclass(frozen=True)
class Stem:
    """What a tree is drafted below, in a batch: one answer's rows that the drafter has not read, and its plan."""

    drafting: Drafting
    """Over a seat of the batch's cache."""
    seat: int
    token_T: torch.Tensor
    feature_TD: torch.Tensor
    picker: Picker
    plan: Plan


class BatchDrafting:
    """The drafts of several answers, a level at a time: one pass of the drafter and of the head for all of them."""

    def __init__(self, stems: Sequence[Stem]) -> None:
        first = stems[0].drafting
        assert isinstance(first.slots, SlotCache) and first.slots.whole is not None, "a batch shares a cache"
        self.drafter, self.lent, self.head, self.cache = first.drafter, first.lent, first.head, first.slots.whole
        self.stems, self.device = stems, self.lent.head_VD.device
        seats = [stem.seat for stem in stems]
        self.seat_B = None if seats == list(range(len(seats))) else torch.tensor(seats, device=self.device)
        self.topk = max(stem.plan.topk for stem in stems)

    def draft(self, clock: Clock) -> list[tree.Draft]:
        """As `Drafting.draft`, for each stem."""
        hidden_BD = self.feed()
        clock.lap("draft")
        drafts = self.grow(hidden_BD)
        clock.lap("draft")
        return drafts

    def feed(self) -> torch.Tensor:
        """Append each answer's committed rows; the drafted feature [B,D] after the last of them.

        Shorter ones are filled up with their last row, written again to the same place.
        """
        tokens, features = [], []
        for stem in self.stems:
            token_T, feature_TD = stem.token_T, stem.feature_TD
            if token_T.numel() > FEW_ROWS:
                stem.drafting.feed(token_T[:-1], feature_TD[:-1])
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
        for stem, rows in zip(self.stems, new, strict=True):
            stem.drafting.slots.length += rows
        return hidden_BTD[:, -1]

    def _committed(self) -> list[int]:
        return [stem.drafting.slots.length for stem in self.stems]

    def grow(self, hidden_BD: torch.Tensor) -> list[tree.Draft]:
        """A tree below each root, from the drafted feature that follows it."""
        past, stems = self._committed(), self.stems
        vocab = self.lent.head_VD.shape[0]
        aheads = [
            stem.picker.ahead(rows + 1, stem.plan.depth, vocab, self.device)
            for stem, rows in zip(stems, past, strict=True)
        ]
        columns = max(past) + max(stem.plan.depth for stem in stems) * self.topk
        proposed = zip(stems, past, *self._propose(hidden_BD, aheads, [1] * len(stems), 0), strict=True)
        beams = [
            tree.plant(logprob_1C[0], token_1C[0], stem.plan.topk, masks.committed(rows, columns, hidden_BD))
            for stem, rows, logprob_1C, token_1C in proposed
        ]
        firsts, starts, hidden_ND = past, list(range(len(stems))), hidden_BD
        for level in range(1, max(stem.plan.depth for stem in stems)):
            beams = [self._narrow(stem, beam, level) for stem, beam in zip(stems, beams, strict=True)]
            widths = [beam.token_N.numel() for beam in beams]
            if not any(widths):
                break
            feature_ND = torch.cat([hidden_ND[start + beam.row_N] for start, beam in zip(starts, beams, strict=True)])
            for first, width, beam in zip(firsts, widths, beams, strict=True):
                tree.settle(beam, torch.arange(first, first + width, device=self.device))
            hidden_ND = self._level(beams, feature_ND, firsts, [rows - 1 + level for rows in past])
            proposals = zip(stems, beams, *self._propose(hidden_ND, aheads, widths, level), strict=True)
            beams = [
                tree.extend(beam, logprob_WC, token_WC, stem.plan.topk) if len(token_WC) else beam
                for stem, beam, logprob_WC, token_WC in proposals
            ]
            starts = [sum(widths[:seat]) for seat in range(len(widths))]
            firsts = [first + width for first, width in zip(firsts, widths, strict=True)]
        return [tree.rerank(beam, stem.token_T[-1:], stem.plan.count) for stem, beam in zip(stems, beams, strict=True)]

    def _narrow(self, stem: Stem, beam: tree.Beam, level: int) -> tree.Beam:
        wide = level < stem.plan.depth and beam.token_N.numel()
        return tree.narrow(beam, stem.plan.width(beam.score_N) if wide else 0)

    def _propose(
        self, hidden_ND: torch.Tensor, aheads: list[Ahead], widths: list[int], level: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`Drafting.propose` for all answers, each with its number of rows."""
        found = self.head.candidates(self.drafter.hidden(hidden_ND))
        if all(ahead.noise_LV is None and ahead.sampler == aheads[0].sampler for ahead in aheads):
            logprob_NC = aheads[0].rank(level, found.logit_NC, found.token_C)
        else:
            tokens = [found.token_C] * len(aheads) if found.token_C.dim() == 1 else found.token_C.split(widths)
            parts = zip(aheads, found.logit_NC.split(widths), tokens, strict=True)
            logprob_NC = torch.cat([ahead.rank(level, logit_NC, token_C) for ahead, logit_NC, token_C in parts])
        logprob_NR, token_NR = Candidates(logprob_NC, found.token_C).best(self.topk)
        shifted = [
            (part_NR + stem.plan.shift).clamp_max(0) if stem.plan.shift else part_NR
            for stem, part_NR in zip(self.stems, logprob_NR.split(widths), strict=True)
        ]
        return shifted, list(token_NR.split(widths))

    def _level(
        self, beams: list[tree.Beam], feature_ND: torch.Tensor, firsts: list[int], position: list[int]
    ) -> torch.Tensor:
        """The drafted features [N,D] of all beams' nodes: for each seat, its first column and its nodes' position."""
        device, widths = self.device, [beam.token_N.numel() for beam in beams]
        valid_BW = torch.arange(max(widths), device=device) < torch.tensor(widths, device=device)[:, None]
        token_BW = torch.zeros(valid_BW.shape, dtype=torch.long, device=device)
        token_BW[valid_BW] = torch.cat([beam.token_N for beam in beams])
        feature_BWD = feature_ND.new_zeros(*valid_BW.shape, feature_ND.shape[1])
        feature_BWD[valid_BW] = feature_ND
        column_BW = torch.tensor(firsts, device=device)[:, None] + torch.arange(max(widths), device=device)
        sees_BWK = pad_sequence([beam.sees_NK for beam in beams], batch_first=True)[:, :, : max(firsts) + max(widths)]
        position_B1 = torch.tensor(position, device=device)[:, None]
        return self._forward(token_BW, feature_BWD, position_B1, column_BW, sees_BWK)[valid_BW]

    def _forward(
        self,
        token_BT: torch.Tensor,
        feature_BTD: torch.Tensor,
        position_BT: torch.Tensor,
        column_BT: torch.Tensor,
        sees_BTK: torch.Tensor,
    ) -> torch.Tensor:
        def attend(query_BHTE: torch.Tensor, key_BGTE: torch.Tensor, value_BGTE: torch.Tensor) -> torch.Tensor:
            key_BGKE, value_BGKE = self.cache.update(key_BGTE, value_BGTE)
            return grouped(query_BHTE, key_BGKE, value_BGKE, sees_BTK[:, None])

        turn = self.drafter.rope(position_BT, feature_BTD.dtype)
        with self.cache.place(column_BT, sees_BTK.shape[-1], self.seat_B):
            return self.drafter(self.lent.embed(token_BT), feature_BTD, turn, attend)
