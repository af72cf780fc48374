"""CORAL's cross-step representation alignment (CSRA): InfoNCE with cosine similarity over the unroll steps' outputs.

    -log exp(cos(q, f+) / tau) / (exp(cos(q, f+) / tau) + Σ_{f-} exp(cos(q, f-) / tau))

q is a step's output at a row, f+ the same row in another step, f- other rows of that other step in the same sequence.
CORAL (arXiv 2502.16880) has no public code. Which rows are negatives, how many, and which side gets the gradient were
recipe keys once; LOG.md has what they showed. At most R negatives, shared by a sequence's queries, keep memory at
O(N·R).

Axes: S unroll step, B batch, N row that carries a loss (of a sequence's packed to the left, or of all sequences'), D
hidden, R place in a list of negatives, T position.
"""

import torch

NEGATIVES = 256
"""Rows of the sequence that each row is contrasted with, at most; drawn for each batch when there are more."""


def csra(
    hidden_SBND: torch.Tensor,
    present_BN: torch.Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Sum over steps and present rows of the mean loss over the row's outputs in the other steps, in float32.

    With one step there is nothing to align: 0. Steps before `first` are not trained: two of them are not compared.
    """
    unit_SBND = torch.nn.functional.normalize(hidden_SBND.float(), dim=-1)
    steps = len(unit_SBND)
    if steps == 1:
        return hidden_SBND.sum() * 0.0
    row_BR, usable_BNR = draw_negatives(present_BN, generator)
    others = list(unit_SBND)  # taken apart once: gradients are then added in one order
    negatives = [take_rows(other_BND, row_BR) for other_BND in others]
    total = torch.zeros((), device=hidden_SBND.device)
    for step, query_BND in enumerate(unit_SBND):
        for other in range(steps):
            if other == step or max(step, other) < first:
                continue
            positive_BN = (query_BND * others[other]).sum(-1) / temperature
            score_BNR = query_BND @ negatives[other].transpose(-1, -2) / temperature
            score_BNR = score_BNR.masked_fill(~usable_BNR, -torch.inf)
            loss_BN = torch.cat((positive_BN[..., None], score_BNR), dim=-1).logsumexp(-1) - positive_BN
            total = total + loss_BN.masked_fill(~present_BN, 0.0).sum()
    return total / (steps - 1)


def draw_negatives(present_BN: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices [B,R] of each sequence's negatives, and which of them each row may use, [B,N,R] bool."""
    rows = present_BN.shape[1]
    score_BN = present_BN.float()
    if rows > NEGATIVES:
        score_BN = score_BN * (1 + torch.rand(score_BN.shape, generator=generator, device=score_BN.device))
    row_BR = score_BN.topk(min(rows, NEGATIVES), dim=-1).indices
    own_NR = torch.arange(rows, device=row_BR.device)[:, None] == row_BR[:, None]
    return row_BR, present_BN.gather(1, row_BR)[:, None] & ~own_NR


def take_rows(value_BTD: torch.Tensor, row_BN: torch.Tensor) -> torch.Tensor:
    """[B,N,D]: the rows of each sequence that `row_BN` names. Whole rows are copied: an index per element is slow."""
    first_B1 = torch.arange(len(value_BTD), device=row_BN.device)[:, None] * value_BTD.shape[1]
    return value_BTD.flatten(0, 1).index_select(0, (first_B1 + row_BN).flatten()).unflatten(0, row_BN.shape)


def cross_step_cosine(hidden_SND: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean cosine between the first step's output and each later one's; 0 with one step."""
    if len(hidden_SND) == 1:
        return torch.zeros((), device=hidden_SND.device)
    first_ND, later_SND = hidden_SND[0].detach().float(), hidden_SND[1:].detach().float()
    return torch.nn.functional.cosine_similarity(first_ND[None], later_SND, dim=-1).mean(0).sum()
