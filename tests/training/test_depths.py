"""Accuracy by depth and rank on held-out dialogues, against ranks counted one by one."""

import pytest
import torch

from coral_core.store.batches import batch_of
from coral_core.training.depths import DEPTHS, RANKS, by_depth
from coral_core.training.unroll import loss_rows, unroll
from tests.training.helpers import tiny_drafter, tiny_store

CPU = torch.device("cpu")


def test_ranks_counted_one_by_one(tmp_path):
    store, drafter = tiny_store(tmp_path / "data", samples=14, holdout=11), tiny_drafter()
    lent = store.lent()
    found = by_depth(drafter, lent, store, CPU)
    ranks, cosines = [[] for _ in range(DEPTHS)], []
    for index in store.holdout_indices:
        batch = batch_of(store, [index])
        outputs = unroll(drafter, lent, batch, DEPTHS)
        for row in loss_rows(batch)[0].nonzero()[:, 0].tolist():
            token = int(lent.logits(batch.feature_BTD[0, row + 1]).argmax())
            chain = [output_BTD[0, row] for output_BTD in outputs]
            for depth, hidden_D in enumerate(chain):
                order = lent.logits(hidden_D).argsort(descending=True).tolist()
                ranks[depth].append(order.index(token))
            pairs = [torch.cosine_similarity(chain[0], other_D, dim=0).item() for other_D in chain[1:]]
            cosines.append(sum(pairs) / len(pairs))
    expected = [[sum(rank <= k for rank in seen) / len(seen) for k in range(RANKS)] for seen in ranks]
    assert found["accuracy_by_depth"] == [pytest.approx(row) for row in expected]
    assert found["held_out_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert 0 < expected[0][0] < expected[0][-1], "some hits and some misses, or this shows nothing"


def test_nothing_held_out_gives_nothing(tmp_path):
    store = tiny_store(tmp_path / "data")
    assert by_depth(tiny_drafter(), store.lent(), store, CPU) == {}
