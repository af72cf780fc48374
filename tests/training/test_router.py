"""The router learns where the target's probability lies."""

from pathlib import Path

import torch

from coral_core.head.clustering import by_id
from coral_core.recipe.schema import HeadSpec
from coral_core.store.batches import collate
from coral_core.store.shard import Sample
from coral_core.training.router import Rows, Source, answer_counts, gather, held_out_rows, recall, train_router
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


def test_a_separable_toy_is_learnt_whole() -> None:
    torch.manual_seed(0)
    group_N = torch.randint(5, (4000,))
    hidden_ND = torch.eye(5, 16)[group_N] * 4 + 0.3 * torch.randn(4000, 16)
    rows = Rows(hidden_ND, torch.nn.functional.one_hot(group_N, 5).float(), group_N[:, None])
    router = train_router(
        rows, 16, by_id(20, 5), HeadSpec(groups=5, active=1, router_steps=150, router_learning_rate=1e-2), seed=0
    )
    assert recall(router, rows, 1)["argmax"] > 0.99


def test_labels_are_the_targets_mass_per_group(tmp_path: Path) -> None:
    lent, drafter, groups = tiny_lent(), tiny_drafter().requires_grad_(False), by_id(VOCABULARY, 6)
    samples = some_samples(5)
    store = make_store(tmp_path / "data", samples, lent=lent, holdout=2)
    rows = gather(Source(drafter, lent, groups, 3), store, seed=0)
    assert len(rows.hidden_ND) == 3 * 8 * 7  # three steps, a full batch of dialogues, seven rows that draft an answer's
    torch.testing.assert_close(rows.mass_NG.sum(1), torch.ones(len(rows.mass_NG)), rtol=0, atol=1e-5)
    unseen = held_out_rows(Source(drafter, lent, groups, 2), store)
    batch = collate(samples[3:])
    wanted_BR = loss_rows(batch)
    p_NV = lent.logits(batch.feature_BTD[:, 1:][wanted_BR]).softmax(-1)
    expected_NG = p_NV.unflatten(1, (6, 8)).sum(-1)
    torch.testing.assert_close(unseen.mass_NG, expected_NG.repeat(2, 1), rtol=0, atol=1e-5)
    assert torch.equal(unseen.top_NK[:, 0], (p_NV.argmax(1) // 8).repeat(2))
    outputs = unroll(drafter, lent, batch, 2, wanted_BR=wanted_BR)
    torch.testing.assert_close(unseen.hidden_ND, torch.cat([out[wanted_BR] for out in outputs]), rtol=0, atol=1e-5)


def test_only_the_training_answers_are_counted(tmp_path: Path) -> None:
    ids = [torch.tensor([1, 1, 2, 3]), torch.tensor([5, 5, 5, 5])]
    answer_T = torch.tensor([False, True, True, True])
    samples = [Sample(ids_T, answer_T, torch.zeros(4, 8)) for ids_T in ids]
    count_V = answer_counts(make_store(tmp_path / "data", samples, holdout=1), 8)
    assert count_V.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


def test_recall_by_hand() -> None:
    """A router that always ranks group 0 first, then group 1."""

    def router(hidden_ND: torch.Tensor) -> torch.Tensor:
        return torch.tensor([3.0, 2.0, 1.0]).expand(len(hidden_ND), -1)

    mass_NG = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    rows = Rows(torch.zeros(2, 4), mass_NG, torch.tensor([[0, 2], [2, 1]]))
    assert recall(router, rows, 2) == {"argmax": 0.5, "top10": 0.5, "mass": 0.375}  # type: ignore[arg-type]
