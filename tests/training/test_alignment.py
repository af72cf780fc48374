"""CSRA against numbers that can be checked by hand."""

import math

import pytest
import torch

from coral_core.training import alignment

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
ALL = torch.ones(1, 2, dtype=torch.bool)


def csra(*steps, present=ALL):
    return alignment.csra(torch.tensor(steps)[:, None], present, 1.0).item()


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


def test_a_padded_row_is_neither_query_nor_negative():
    present_BN = torch.tensor([[True, False]])
    assert csra((EAST, NORTH), (EAST, NORTH), present=present_BN) == pytest.approx(0, abs=1e-6)


def test_one_step_has_nothing_to_align():
    assert csra((EAST, NORTH)) == 0


def test_both_sides_of_a_pair_are_moved():
    """The query and the row that it is contrasted with: of two steps each is both."""
    hidden_SBND = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    alignment.csra(hidden_SBND, torch.ones(1, 4, dtype=torch.bool), 0.2).backward()
    both = hidden_SBND.grad.clone()
    hidden_SBND.grad = None
    first_BND, second_BND = hidden_SBND[0], hidden_SBND[1].detach()
    alignment.csra(torch.stack((first_BND, second_BND)), torch.ones(1, 4, dtype=torch.bool), 0.2).backward()
    torch.testing.assert_close(hidden_SBND.grad[0], both[0])
    assert both[1].abs().max() > 0


def test_steps_that_are_not_trained_are_not_compared():
    """Of three steps the last one alone is trained: it and each of the others, both ways."""
    east = torch.tensor((EAST, NORTH))[None]
    hidden_SBND = torch.stack((east, east.flip(1), east))
    got = alignment.csra(hidden_SBND, ALL, 1.0, first=2).item()
    pairs = [alignment.csra(hidden_SBND[[one, 2]], ALL, 1.0).item() for one in (0, 1)]
    assert got == pytest.approx(sum(pairs) / 2, rel=1e-5)


def test_negatives_are_capped_seeded_and_present(monkeypatch):
    monkeypatch.setattr(alignment, "NEGATIVES", 5)
    present_BN = torch.arange(20)[None] < torch.tensor([[20], [7]])
    draws = [alignment.draw_negatives(present_BN, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    row_BR, usable_BNR = draws[0]
    assert row_BR.shape == (2, 5)
    assert usable_BNR.shape == (2, 20, 5)
    assert row_BR[1].max() < 7
    assert len(set(row_BR[0].tolist())) == 5
    assert torch.equal(row_BR, draws[1][0])
    assert not torch.equal(row_BR, draws[2][0])
    assert not usable_BNR[0, row_BR[0, 2], 2], "a row is not its own negative"


def test_capped_negatives_by_drawing():
    """Three rows, all drawn: each may use the two others; the second sequence has only its first row."""
    present_BN = torch.tensor([[True, True, True], [True, False, False]])
    row_BR, usable_BNR = alignment.draw_negatives(present_BN, None)
    usable_BNN = torch.zeros(2, 3, 3, dtype=torch.bool).scatter_(2, row_BR[:, None].expand(2, 3, 3), usable_BNR)
    F, T = False, True
    assert usable_BNN[0].tolist() == [[F, T, T], [T, F, T], [T, T, F]]
    assert usable_BNN[1].tolist() == [[F, F, F], [T, F, F], [T, F, F]]


def test_cosine_between_steps_by_hand():
    hidden_SND = torch.tensor([[EAST, EAST], [EAST, NORTH], [NORTH, WEST]])
    assert alignment.cross_step_cosine(hidden_SND).item() == pytest.approx((1 + 0) / 2 + (0 - 1) / 2)
    assert alignment.cross_step_cosine(hidden_SND[:1]).item() == 0
