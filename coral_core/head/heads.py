"""The heads that a draft may be made with: all rows of the vocabulary, the most frequent ones, or a router's groups.

Axes: N row, D hidden, V vocabulary, of a grouped head in permuted order, C candidate token, G group, R place in a list:
of proposed tokens, of active groups.
"""

import dataclasses
from typing import Protocol

import torch
from torch import nn

from coral_core.head.groups import Groups
from coral_core.kernels import blocks
from coral_core.kernels.blocks import Blocks, runs
from coral_core.kernels.layers import PackedLinear
from coral_core.lent import Lent


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The drafter's logits of the active tokens, with their ids in the target's vocabulary."""

    logit_NC: torch.Tensor
    """log q up to a constant for each row."""
    token_C: torch.Tensor
    """[C] when all rows look at the same tokens, [N,C] when each has its own."""

    def best(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` most likely tokens of each row, best first: logits and ids, both [N,R]."""
        logit_NR, place_NR = self.logit_NC.topk(min(count, self.logit_NC.shape[-1]))
        if self.token_C.dim() == 1:
            return logit_NR, self.token_C[place_NR]
        return logit_NR, self.token_C.gather(-1, place_NR)


class Head(Protocol):
    """Turns the drafter's hidden states into candidates."""

    recordable: bool
    """Whether nothing in it waits for the device, so that a draft can be recorded (decoding/recorded.py)."""

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Candidates for rows [N,D]."""
        ...


class FullHead:
    """The target's own LM head, multiplied whole: the reference for all others."""

    recordable = True

    def __init__(self, lent: Lent) -> None:
        self.lent = lent
        self.token_V = torch.arange(lent.head_VD.shape[0], device=lent.head_VD.device)

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the whole vocabulary."""
        return Candidates(self.lent.logits(hidden_ND.to(self.lent.head_VD.dtype)), self.token_V)


class StaticHead:
    """Always the same tokens, the most frequent ones (FR-Spec, arXiv 2502.14856): a baseline.

    The rows of the tokens that were kept, copied once into one block: the target's, or a drafter's own.
    """

    recordable = True

    def __init__(self, lent: Lent, token_C: torch.Tensor, own_CD: torch.Tensor | None = None) -> None:
        self.lent = lent
        self.token_C = token_C.to(lent.head_VD.device)
        self.dtype = lent.head_VD.dtype
        rows_CD = lent.head_VD[self.token_C] if own_CD is None else own_CD.to(lent.head_VD)
        self.block = Blocks(rows_CD, [0, self.token_C.numel()])
        own = own_CD is not None or lent.head_bias_V is None
        self.bias_C = None if own else lent.head_bias_V[self.token_C]  # type: ignore[index]

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the kept tokens."""
        raw_NC = self.block.products(hidden_ND.to(self.dtype), [0])
        if self.bias_C is not None:
            raw_NC = raw_NC + self.bias_C
        return Candidates(self.lent.transform(raw_NC), self.token_C)


class Router(nn.Module):
    """From the drafter's hidden state to a probability per group of head rows (CORAL, arXiv 2502.16880): softmax(W2 h);
    with `inner`, the paper's softmax(W2(act(W1 h) + h)).

    One linear layer is the default: W1 is as large as the head rows that a 32,000-token head reads at 1/8, and on pico
    it kept no more of the target's tokens (LOG.md).
    """

    def __init__(self, hidden: int, groups: int, *, inner: bool = False) -> None:
        super().__init__()
        self.w1 = PackedLinear(hidden, hidden) if inner else None
        self.w2 = PackedLinear(hidden, groups)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N,G]; their softmax is the share of each group that grouping/router.py teaches."""
        if self.w1 is not None:
            hidden_ND = nn.functional.silu(self.w1(hidden_ND)) + hidden_ND
        logits_NG: torch.Tensor = self.w2(hidden_ND)
        return logits_NG


class GroupedHead:
    """A router reads the drafter's hidden state, and only the `active` best groups' rows are multiplied (CORAL).

    The rows are permuted once so that a group is one contiguous block, and an active group a slice. All rows of one
    tree level share their groups: a union with a fixed budget reads each weight once, whatever the number of rows.
    """

    def __init__(self, lent: Lent, groups: Groups, router: Router, active: int) -> None:
        device, self.dtype = lent.head_VD.device, lent.head_VD.dtype
        self.lent, self.active, self.start_G = lent, active, groups.start_G
        self.router = router.to(device, self.dtype).requires_grad_(False).eval()
        self.token_V = groups.order_V.to(device)
        self.bias_V = None if lent.head_bias_V is None else lent.head_bias_V[self.token_V]
        rows_VD = lent.head_VD[self.token_V]
        self.fused = blocks.fits(lent, rows_VD)
        self.recordable = self.fused  # which groups are active then stays on the device
        self.start_device_G = torch.tensor(self.start_G, dtype=torch.int32, device=device)
        self.blocks = Blocks(rows_VD, self.start_G)

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Of the active groups' tokens.

        Nothing is made of the mass that the router sees elsewhere: branches scored with it, so that a row whose groups
        were crowded out of the union counts for less, gave 0.996 to 1.016 of tau (pico, 2, 4 and 16 of 256 groups).
        """
        hidden_ND = hidden_ND.to(self.dtype)
        chosen_R = self.router(hidden_ND).softmax(-1, dtype=torch.float32).sum(0).topk(self.active).indices
        if self.fused and self.blocks.rows_VD is not None:
            start_G = self.start_device_G
            best = blocks.grouped_best(hidden_ND, self.blocks.rows_VD, start_G, chosen_R[None], self.bias_V)
            return Candidates(best.logit_NC, self.token_V[best.row_NC])
        active = sorted(chosen_R.tolist())
        spans = runs(active, self.start_G)
        raw_NC = self.blocks.products(hidden_ND, active)
        if self.bias_V is not None:
            raw_NC = raw_NC + _gather(self.bias_V, spans)
        return Candidates(self.lent.transform(raw_NC), _gather(self.token_V, spans))


def _gather(by_row_V: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    parts = [by_row_V[first:end] for first, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
