"""Growing one draft with the drafter and its cache.

The drafter's cache holds a row per committed position, then, while a tree grows, a row per expanded node; those are
cut again when the draft is done, because verified features replace drafted ones (EAGLE-2).
Axes: B batch, T position, D hidden, L level, N beam node, R proposed token, S drafted row, C candidate, K cached row,
H query head, G key/value head, E head dimension.
"""

import dataclasses
import math

import torch

from coral_core.decoding import masks, tree
from coral_core.decoding.cache import Slots
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
        return True

    def width(self, score_N: torch.Tensor) -> int:
        return int((score_N >= self.floor).sum()) if self.confidence else score_N.numel()

    def count(self, score_N: torch.Tensor) -> int:
        return min(self.nodes, self.width(score_N))

    def learn(self, draft: tree.Draft, verdict: Verdict) -> None:
        """A fixed tree learns nothing."""


class Drafting:
    """The drafter, its head and its cache, for one answer."""

    def __init__(self, drafter: Drafter, lent: Lent, head: Head, plan: Plan, slots: Slots) -> None:
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
