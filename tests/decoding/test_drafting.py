"""A drafted tree believes in each of its paths what the drafter does when it is shown that path alone, from the start.

Lossless decoding says nothing of this: where a draft sees the wrong rows, or turns by the wrong positions, fewer of its
tokens are accepted, and that is all.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from coral_core.decoding.cache import SlotCache, Slots
from coral_core.decoding.drafting import BatchDrafting, Drafting, DraftInput
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Clock
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.tree import Draft
from coral_core.drafter.model import Drafter
from coral_core.head.heads import FullHead
from coral_core.target.target import Target
from tests.tiny import VOCAB, tiny_drafter, tiny_target

SHAPE = TreeShape(depth=4, nodes=12, topk=3)
ROWS = (9, 5)


def lively() -> tuple[Target, Drafter]:
    """Weights large enough that what a row sees, and where it stands, decides what it drafts."""
    target = tiny_target("qwen3")
    drafter = tiny_drafter(target)
    for weight in drafter.parameters():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.3)
    return target, drafter


def committed(target: Target, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    width = target.lent.embed_VD.shape[1]
    return torch.randint(3, VOCAB, (rows,), generator=generator), torch.randn(rows, width, generator=generator)


def causal(query_BHTE: torch.Tensor, key_BJTE: torch.Tensor, value_BJTE: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query_BHTE, key_BJTE, value_BJTE, is_causal=True, enable_gqa=True)


def believed(
    target: Target, drafter: Drafter, token_T: torch.Tensor, feature_TD: torch.Tensor, path: list[int]
) -> torch.Tensor:
    """The score of a path behind the committed rows, without a cache or a tree."""
    score = torch.zeros(())
    for token in path:
        turn = drafter.rope(torch.arange(token_T.numel())[None], torch.float32)
        hidden_TD = drafter(target.lent.embed(token_T)[None], feature_TD[None], turn, causal)[0]
        score = score + Sampler().rank(target.lent.logits(hidden_TD[-1:]), torch.arange(VOCAB), None)[0, token]
        token_T, feature_TD = torch.cat((token_T, torch.tensor([token]))), torch.cat((feature_TD, hidden_TD[-1:]))
    return score


def path_to(draft: Draft, row: int) -> list[int]:
    path: list[int] = []
    while row:
        path.insert(0, int(draft.token_M[row]))
        row = int(draft.parent_M[row])
    return path


def check(target: Target, drafter: Drafter, rows: int, draft: Draft) -> None:
    assert draft.token_M.numel() == SHAPE.nodes + 1
    assert int(draft.depth_M.max()) > 2
    for row in range(1, SHAPE.nodes + 1):
        expected = believed(target, drafter, *committed(target, rows), path_to(draft, row))
        torch.testing.assert_close(draft.score_M[row], expected, rtol=0, atol=2e-4)


def test_one_draft() -> None:
    target, drafter = lively()
    for rows in ROWS:
        drafting = Drafting(drafter, target.lent, FullHead(target.lent), SHAPE, Slots(rows + SHAPE.rows))
        check(target, drafter, rows, drafting.draft(*committed(target, rows), Sampler(), Clock()))


def test_drafts_of_a_batch() -> None:
    target, drafter = lively()
    cache = SlotCache(1, max(ROWS) + SHAPE.rows)
    for seats in ((0, 1), (2, 1)):  # the first ones, which are read in place, and others
        inputs = []
        for rows, seat in zip(ROWS, seats, strict=True):
            cache.seat(seat).length = 0
            drafting = Drafting(drafter, target.lent, FullHead(target.lent), SHAPE, cache.seat(seat))
            inputs.append(DraftInput(drafting, seat, *committed(target, rows), Sampler(), SHAPE))
        for rows, draft in zip(ROWS, BatchDrafting(inputs).draft(), strict=True):
            check(target, drafter, rows, draft)


class Hopeful(TreeShape):
    """What the target picks is surer than the drafter thinks."""

    shift = 5.0


def test_no_word_is_more_than_sure() -> None:
    """Else a child might outrank its parent, and stand in a tree without it."""
    target, drafter = lively()
    plan = Hopeful(depth=4, nodes=12, topk=3)
    drafting = Drafting(drafter, target.lent, FullHead(target.lent), plan, Slots(9 + plan.rows))
    draft = drafting.draft(*committed(target, 9), Sampler(), Clock())
    assert (draft.score_M <= draft.score_M[draft.parent_M]).all()
    assert draft.score_M.max() == 0
