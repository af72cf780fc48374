"""CORAL's cross-step representation alignment (CSRA): InfoNCE with cosine similarity over the unroll steps' outputs.

    -log exp(cos(q, f+) / tau) / (exp(cos(q, f+) / tau) + Σ_{f-} exp(cos(q, f-) / tau))

q is a step's output at a row, f+ the same row in another step, f- other rows of that other step in the same sequence.
CORAL (arXiv 2502.16880) has no public code. Which rows are negatives, how many, and which side gets the gradient were
recipe keys once; LOG.md has what they showed. At most M negatives, shared by a sequence's queries, keep memory at
O(A·M).

Axes: S unroll step, B batch, A row that carries a loss (packed to the left), D hidden, M negative.
"""

import torch

NEGATIVES = 256
"""M: rows of the sequence that each row is contrasted with, at most; drawn for each batch when there are more."""


def csra(
    hidden_SBAD: torch.Tensor,
    present_BA: torch.Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sum over steps and present rows of the mean loss over the row's outputs in the other steps, in float32.

    With one step there is nothing to align: 0.
    """
    unit_SBAD = torch.nn.functional.normalize(hidden_SBAD.float(), dim=-1)
    steps = len(unit_SBAD)
    if steps == 1:
        return hidden_SBAD.sum() * 0.0
    row_BM, usable_BAM = draw_negatives(present_BA, generator)
    negatives = [take_rows(other_BAD, row_BM) for other_BAD in unit_SBAD]
    total = torch.zeros((), device=hidden_SBAD.device)
    for step, query_BAD in enumerate(unit_SBAD):
        for other in range(steps):
            if other == step:
                continue
            positive_BA = (query_BAD * unit_SBAD[other]).sum(-1) / temperature
            score_BAM = query_BAD @ negatives[other].transpose(-1, -2) / temperature
            score_BAM = score_BAM.masked_fill(~usable_BAM, -torch.inf)
            loss_BA = torch.cat((positive_BA[..., None], score_BAM), dim=-1).logsumexp(-1) - positive_BA
            total = total + loss_BA.masked_fill(~present_BA, 0.0).sum()
    return total / (steps - 1)


def draw_negatives(present_BA: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices [B,M] of each sequence's negatives, and which of them each row may use, [B,A,M] bool."""
    rows = present_BA.shape[1]
    score_BA = present_BA.float()
    if rows > NEGATIVES:
        score_BA = score_BA * (1 + torch.rand(score_BA.shape, generator=generator, device=score_BA.device))
    row_BM = score_BA.topk(min(rows, NEGATIVES), dim=-1).indices
    own_AM = torch.arange(rows, device=row_BM.device)[:, None] == row_BM[:, None]
    return row_BM, present_BA.gather(1, row_BM)[:, None] & ~own_AM


def take_rows(value_BRD: torch.Tensor, row_BA: torch.Tensor) -> torch.Tensor:
    """[B,A,D]: the rows of each sequence that `row_BA` names. Whole rows are copied: an index per element is slow."""
    first_B1 = torch.arange(len(value_BRD), device=row_BA.device)[:, None] * value_BRD.shape[1]
    return value_BRD.flatten(0, 1).index_select(0, (first_B1 + row_BA).flatten()).unflatten(0, row_BA.shape)


def cross_step_cosine(hidden_SND: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the mean cosine between the first step's output and each later one's; 0 with one step."""
    if len(hidden_SND) == 1:
        return torch.zeros((), device=hidden_SND.device)
    first_ND, later_SND = hidden_SND[0].detach().float(), hidden_SND[1:].detach().float()
    return torch.nn.functional.cosine_similarity(first_ND[None], later_SND, dim=-1).mean(0).sum()
