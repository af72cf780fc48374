"""CSRA against numbers that can be checked by hand. Axes: S step, B batch, A packed row, D hidden, M negative."""

import math

import pytest
import torch

from coral_core.training import alignment
from coral_core.training.alignment import Alignment

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
ALL = torch.ones(1, 2, dtype=torch.bool)
TOKENS = torch.tensor([[7, 8]])


def csra(*steps, present=ALL, tokens=TOKENS, feature=None, **settings):
    hidden_SBAD = torch.tensor(steps)[:, None]
    feature_BAD = torch.zeros_like(hidden_SBAD[0]) if feature is None else torch.tensor(feature)[None]
    return alignment.csra(hidden_SBAD, feature_BAD, present, tokens, Alignment(temperature=1.0, **settings)).item()


def nce(positive, *negatives):
    return -math.log(math.exp(positive) / (math.exp(positive) + sum(map(math.exp, negatives))))


def test_two_steps_by_hand():
    """A query's own row in the other step is the positive, that step's other row the negative; length is nothing."""
    assert csra((EAST, NORTH), ((2.0, 0.0), (0.0, 5.0))) == pytest.approx(4 * nce(1, 0), rel=1e-5)
    queries = nce(0, -1), nce(0, 1), nce(0, 1), nce(0, -1)
    assert csra((EAST, NORTH), (NORTH, WEST)) == pytest.approx(sum(queries), rel=1e-5)


def test_three_steps_take_the_mean_over_the_two_others():
    same = (EAST, NORTH)
    assert csra(same, same, same) == pytest.approx(6 * nce(1, 0), rel=1e-5)


def test_the_target_s_feature_is_a_positive_but_never_a_query():
    """One step: its two rows are aligned with the target's features alone."""
    assert csra((EAST, NORTH)) == 0
    assert csra((EAST, NORTH), feature=(EAST, WEST), include_target=True) == pytest.approx(nce(1, -1) + nce(0, 0))


def test_a_padded_row_is_neither_query_nor_negative():
    present_BA = torch.tensor([[True, False]])
    assert csra((EAST, NORTH), (EAST, NORTH), present=present_BA) == pytest.approx(0, abs=1e-6)


def test_rows_with_the_same_next_token_are_no_negatives_when_masked():
    same = (EAST, NORTH)
    tokens_BA = torch.tensor([[7, 7]])
    assert csra(same, same, tokens=tokens_BA) == pytest.approx(4 * nce(1, 0), rel=1e-5)
    assert csra(same, same, tokens=tokens_BA, mask_same_token=True) == pytest.approx(0, abs=1e-6)


def test_gradient_side():
    """With `query_only` a step is pulled as a query alone; with both sides it is pulled as a key too."""
    torch.manual_seed(0)
    grads = []
    for query_only in (False, True):
        hidden_SBAD = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        present_BA, token_BA = torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None]
        settings = Alignment(query_only=query_only)
        alignment.csra(hidden_SBAD, hidden_SBAD[0].detach(), present_BA, token_BA, settings).backward()
        grads.append(hidden_SBAD.grad)
    assert not torch.allclose(grads[0], grads[1])
    assert grads[1].abs().max() > 0


def test_negatives_are_capped_seeded_and_present():
    present_BA = torch.arange(20)[None] < torch.tensor([[20], [7]])
    token_BA = torch.zeros(2, 20, dtype=torch.int64)
    settings = Alignment(negatives=5)
    draws = [
        alignment.draw_negatives(present_BA, token_BA, settings, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    row_BM, usable_BAM = draws[0]
    assert row_BM.shape == (2, 5)
    assert usable_BAM.shape == (2, 20, 5)
    assert row_BM[1].max() < 7
    assert len(set(row_BM[0].tolist())) == 5
    assert torch.equal(row_BM, draws[1][0])
    assert not torch.equal(row_BM, draws[2][0])
    assert not usable_BAM[0, row_BM[0, 2], 2], "a row is not its own negative"


def test_capped_negatives_by_drawing():
    """Three rows, all drawn: each may use the two others; the second sequence has only its first row."""
    present_BA = torch.tensor([[True, True, True], [True, False, False]])
    token_BA = torch.zeros(2, 3, dtype=torch.int64)
    row_BM, usable_BAM = alignment.draw_negatives(present_BA, token_BA, Alignment(), None)
    usable_BAR = torch.zeros(2, 3, 3, dtype=torch.bool).scatter_(2, row_BM[:, None].expand(2, 3, 3), usable_BAM)
    F, T = False, True
    assert usable_BAR[0].tolist() == [[F, T, T], [T, F, T], [T, T, F]]
    assert usable_BAR[1].tolist() == [[F, F, F], [T, F, F], [T, F, F]]


def test_cosine_between_steps_by_hand():
    hidden_SND = torch.tensor([[EAST, EAST], [EAST, NORTH], [NORTH, WEST]])
    assert alignment.cross_step_cosine(hidden_SND).item() == pytest.approx((1 + 0) / 2 + (0 - 1) / 2)
    assert alignment.cross_step_cosine(hidden_SND[:1]).item() == 0
