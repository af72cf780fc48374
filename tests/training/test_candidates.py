"""The loss over candidates: which rows it reads, and when it is exact."""

import dataclasses
import math

import pytest
import torch

from coral_core.lent import Lent
from coral_core.training import losses
from coral_core.training.candidates import Candidates, HeadRows
from coral_core.training.objective import Objective
from coral_core.training.unroll import unroll
from tests.training.helpers import HIDDEN, VOCABULARY, tiny_batch, tiny_drafter, tiny_lent, tiny_store
from tests.training.test_losses import LENTS

FREQUENT = 20
DRAW = Candidates(torch.arange(FREQUENT), 3)


def alike(lent: Lent) -> Lent:
    """The same, but no row is likely from FREQUENT on, and all of these are one row, bias included."""
    head_VD = lent.head_VD.clone()
    head_VD[FREQUENT:] = 0.1 * head_VD[FREQUENT]
    bias_V = torch.linspace(-0.5, 0.5, VOCABULARY)
    bias_V[FREQUENT:] = -1.0
    return dataclasses.replace(lent, head_VD=head_VD, head_bias_V=bias_V)


def no_answers():
    """A batch that brings no tokens of its own."""
    return tiny_batch([4], [(4, 4)])


@pytest.mark.parametrize("scalars", LENTS.values(), ids=LENTS)
def test_rows_that_are_alike_stand_for_each_other_exactly(scalars):
    """Three of 28 equal rows, each counted 28/3 times: loss, parts and gradient are those of the whole vocabulary."""
    lent, weights = alike(tiny_lent(**scalars)), (0.1, 0.9)
    torch.manual_seed(0)
    hidden_SND, feature_ND = torch.randn(2, 7, HIDDEN, requires_grad=True), torch.randn(7, HIDDEN)
    heads = [HeadRows.whole(lent), DRAW.rows(lent, no_answers(), torch.Generator().manual_seed(0))]
    (exact, exact_parts), (found, parts) = (losses.vocabulary(hidden_SND, feature_ND, h, weights, 3) for h in heads)
    exact_grad_SND, grad_SND = (torch.autograd.grad(loss.sum(), hidden_SND)[0] for loss in (exact, found))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_SND, exact_grad_SND, rtol=1e-4, atol=1e-5)
    for name in ("distill_S", "topk_S", "agree_S"):
        torch.testing.assert_close(getattr(parts, name), getattr(exact_parts, name), rtol=1e-5, atol=1e-5)
    tail = lent.logits(feature_ND).softmax(-1)[:, FREQUENT:].sum()
    torch.testing.assert_close(parts.tail_S, tail.expand(2), rtol=1e-5, atol=1e-5)
    assert exact_parts.tail_S.tolist() == [0, 0]


def test_a_drawn_row_far_above_all_others_leaves_the_loss_finite():
    """Of 48 words the first 20 have logit 50 and the others 500: lse is 500 + log 28, far from any certain row. The
    target thinks nothing of any word, so the loss is lse less the mean of all logits."""
    head_VD = torch.full((VOCABULARY, 1), 1.0)
    head_VD[FREQUENT:] = 10.0
    head = DRAW.rows(Lent(head_VD, head_VD), no_answers(), torch.Generator().manual_seed(0))
    loss, _ = losses.vocabulary(torch.full((1, 1, 1), 50.0), torch.zeros(1, 1), head, (1.0, 0.0), 1)
    expected = 500 + math.log(28) - (20 * 50 + 28 * 500) / VOCABULARY
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_over_many_draws_the_loss_is_nearly_the_whole_one():
    """28 different rows in the tail, 14 of them drawn: the mean over 200 draws. Ratios of estimates are biased."""
    lent, draw = tiny_lent(), Candidates(torch.arange(FREQUENT), 14)
    torch.manual_seed(0)
    hidden_SND, feature_ND = torch.randn(1, 50, HIDDEN) / 3, torch.randn(50, HIDDEN) / 3
    exact, _ = losses.vocabulary(hidden_SND, feature_ND, HeadRows.whole(lent), (1.0, 0.0), 1)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        head = draw.rows(lent, no_answers(), generator)
        found.append(losses.vocabulary(hidden_SND, feature_ND, head, (1.0, 0.0), 1)[0])
    assert torch.stack(found).mean().item() == pytest.approx(exact.item(), rel=0.02)


def test_the_rows_of_a_batch_drawn():
    """Its answers' tokens and the frequent ones come first, in order; the drawn ones are others."""
    lent = Lent(torch.zeros(VOCABULARY, 1), torch.arange(VOCABULARY)[:, None].float())
    batch = tiny_batch([6, 3], [(4, 6), (2, 3)])
    batch.ids_BT[0, 4:6], batch.ids_BT[1, 2] = torch.tensor([30, 3]), 41
    few = Candidates(torch.tensor([7, 3, 1]), 4)
    rows = few.rows(lent, batch, torch.Generator().manual_seed(0))
    row_C = rows.lent.head_VD[:, 0].int().tolist()
    assert row_C[: rows.certain] == [1, 3, 7, 30, 41]
    assert len(row_C) == 5 + 4
    assert not {1, 3, 7, 30, 41} & set(row_C[5:])
    assert rows.log_weight == pytest.approx(torch.tensor((VOCABULARY - 5) / 4).log().item())
    again, other = (few.rows(lent, batch, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(again.lent.head_VD, rows.lent.head_VD)
    assert not torch.equal(other.lent.head_VD, rows.lent.head_VD)


def test_frequent_tokens_are_those_of_the_training_answers(tmp_path):
    store = tiny_store(tmp_path, samples=9, holdout=3)
    answers = torch.cat([store[index].ids_T[store[index].answer_T] for index in range(6)])
    count_V = torch.bincount(answers, minlength=VOCABULARY)
    candidates = Candidates.of(store, 12, torch.device("cpu"))
    assert candidates.drawn == 3
    assert len(candidates.frequent_C) == 9
    assert count_V[candidates.frequent_C].min() >= count_V.sort(descending=True).values[9]


@pytest.mark.parametrize("count", [0, VOCABULARY, VOCABULARY + 1])
def test_no_candidates_or_as_many_as_there_are_rows_is_the_whole_vocabulary(tmp_path, count):
    assert Candidates.of(tiny_store(tmp_path), count, torch.device("cpu")) is None


def test_every_row_certain_is_the_whole_vocabulary():
    batch, drafter, lent = tiny_batch([14, 9], [(5, 14), (1, 9)]), tiny_drafter(), tiny_lent()
    hiddens = unroll(drafter, lent, batch, 2)
    whole, candidates = Objective(), Objective(candidates=Candidates(torch.arange(VOCABULARY), 4))
    assert whole(hiddens, batch, lent)[0].item() == candidates(hiddens, batch, lent)[0].item()
