"""The router learns where the target's probability lies."""

import dataclasses
from pathlib import Path

import pytest
import torch

from coral_core.grouping import router
from coral_core.grouping.router import (
    Rows,
    Source,
    drafted,
    first_router,
    gather,
    group_labels,
    held_out_rows,
    recall,
    train_router,
)
from coral_core.head.groups import Groups
from coral_core.lent import Lent
from coral_core.recipe.schema import HeadSpec
from coral_core.store.batches import collate
from coral_core.store.shard import Sample
from coral_core.training.unroll import loss_rows, unroll
from tests.store.helpers import make_store
from tests.training.helpers import HIDDEN, VOCABULARY, tiny_drafter, tiny_lent


def some_samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    answer_T = torch.arange(12) >= 4
    return [
        Sample(
            torch.randint(VOCABULARY, (12,), generator=generator),
            answer_T,
            torch.randn(12, HIDDEN, generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("inner", [False, True])
def test_a_separable_toy_is_learnt_whole(inner: bool) -> None:
    torch.manual_seed(0)
    token_N = torch.randint(20, (4000,))
    groups = Groups.from_order(torch.arange(20), 5)
    hidden_ND = torch.eye(5, 16)[groups.group_V[token_N]] * 4 + 0.3 * torch.randn(4000, 16)
    certain_N1 = torch.ones(4000, 1)
    rows = Rows(hidden_ND[None], hidden_ND, certain_N1, token_N[:, None], certain_N1[None], token_N[None, :, None])
    spec = HeadSpec(groups=5, active=1, router_steps=150)
    lent = Lent(torch.zeros(20, 16), torch.zeros(20, 16))
    router = train_router(first_router(groups, lent, inner=inner), rows, groups, spec, seed=0)
    everywhere_SN = torch.ones(1, 4000, dtype=torch.bool)
    assert recall(router, rows, groups, 1, everywhere_SN)["argmax"] > 0.99


def test_a_router_begins_with_the_mean_logit_of_each_groups_rows() -> None:
    lent = dataclasses.replace(tiny_lent(), logit_scale=0.5)
    groups = Groups.from_order(torch.arange(VOCABULARY), 7)
    hidden_ND = torch.randn(3, HIDDEN)
    expected = [lent.logits(hidden_ND)[:, groups.group_V == g].mean(1) for g in range(7)]
    for inner in (False, True):
        scored_NG = first_router(groups, lent, inner=inner)(hidden_ND)
        torch.testing.assert_close(scored_NG, torch.stack(expected, 1), rtol=0, atol=1e-5)


def test_labels_are_the_roots_of_the_drafters_probabilities_per_group(tmp_path: Path) -> None:
    """The vocabulary of 48 is below the 64 tokens that are kept, so the labels are exact."""
    lent, drafter = tiny_lent(), tiny_drafter().requires_grad_(False)
    groups = Groups.from_order(torch.arange(VOCABULARY), 6)
    samples = some_samples(5)
    store = make_store(tmp_path / "data", samples, lent=lent, holdout=2)
    rows = gather(Source(drafter, lent, 3), store, seed=0)
    assert rows.hidden_SND.shape[:2] == (3, 8 * 7)  # three steps, a full batch of dialogues, seven rows each
    torch.testing.assert_close(group_labels(rows, groups).sum(1), torch.ones(3 * 56), rtol=0, atol=1e-5)
    unseen = held_out_rows(Source(drafter, lent, 2), store)
    batch = collate(samples[3:])
    wanted_BT = loss_rows(batch)
    p_NV = lent.logits(batch.feature_BTD[:, 1:][wanted_BT]).softmax(-1)
    assert torch.equal(unseen.token_NR[:, 0], p_NV.argmax(1))
    outputs = unroll(drafter, lent, batch, 2, wanted_BT=wanted_BT)
    expected_SND = torch.stack([out[wanted_BT] for out in outputs])
    torch.testing.assert_close(unseen.hidden_SND, expected_SND, rtol=0, atol=1e-5)
    q_NV = lent.logits(expected_SND.flatten(0, 1)).softmax(-1)
    root_NG = q_NV.sqrt().unflatten(1, (6, 8)).sum(-1)
    torch.testing.assert_close(group_labels(unseen, groups), root_NG / root_NG.sum(-1, keepdim=True), rtol=0, atol=1e-5)
    best_SN = q_NV.argmax(-1).view(2, -1)
    assert torch.equal(drafted(unseen, 1), best_SN == p_NV.argmax(1))


def test_the_rows_that_fit_are_the_whole_of_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 41 dialogues in batches of eight, rows of some two batches are kept: it is never said that six will come."""
    store = make_store(tmp_path / "data", some_samples(41), lent=tiny_lent())
    source, told = Source(tiny_drafter().requires_grad_(False), tiny_lent(), 1), []
    one = sum(tensor.nbytes for tensor in vars(gather(source, store, seed=0)).values()) / 6
    monkeypatch.setattr(router, "BUFFER_BYTES", int(1.5 * one))
    rows = gather(source, store, seed=0, progress=lambda *said: told.append(said[1:3]))
    assert told == [(1, 2), (2, 2)] and rows.feature_ND.shape[0] == 2 * 8 * 7


def test_held_out_rows_are_shown_and_have_an_end(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", some_samples(81), lent=tiny_lent(), holdout=80)
    source, told = Source(tiny_drafter().requires_grad_(False), tiny_lent(), 1), []
    rows = held_out_rows(source, store, progress=lambda *said: told.append(said[1:3]))
    assert told == [(done, 6) for done in range(1, 7)] and rows.feature_ND.shape[0] == 48 * 7


def test_recall_by_hand() -> None:
    """A router that always ranks group 0 first, then group 1; four tokens in groups 0, 0, 1, 2."""

    def router(hidden_SND: torch.Tensor) -> torch.Tensor:
        return torch.tensor([3.0, 2.0, 1.0]).expand(*hidden_SND.shape[:2], -1)

    groups = Groups(torch.tensor([[0, 1], [2, -1], [3, -1]]))
    hidden_SND = torch.zeros(1, 2, 4)
    prob_NR, token_NR = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[2, 3], [3, 1]])
    rows = Rows(hidden_SND, hidden_SND[0], prob_NR, token_NR, prob_NR[None], token_NR[None])
    found = recall(router, rows, groups, 2, torch.tensor([[True, False]]))  # type: ignore[arg-type]
    assert found == {"argmax": 0.5, "top10": 0.5, "mass": 0.625, "kept": 1.0}


@pytest.mark.parametrize("faster", [False, True])
def test_the_most_likely_tokens_are_those_of_float32(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is faster it only names candidates: neither order nor probabilities are its own."""
    monkeypatch.setattr(router, "bfloat16_is_faster", lambda: faster)
    generator = torch.Generator().manual_seed(3)
    head_VD, hidden_ND = (torch.randn(rows, 64, generator=generator) / 4 for rows in (3000, 40))
    lent = Lent(head_VD, head_VD, torch.randn(3000, generator=generator), logit_scale=0.5, logit_softcap=9.0)
    source = Source(tiny_drafter(), lent, 1)
    assert (source.quick is lent) != faster
    prob_NR, token_NR = router._most_likely(source, hidden_ND)
    logit_NR, wanted_NR = lent.logits(hidden_ND).topk(router.TOP)
    assert torch.equal(token_NR, wanted_NR)
    torch.testing.assert_close(prob_NR, logit_NR.softmax(-1), rtol=0, atol=1e-6)
