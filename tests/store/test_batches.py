"""Batches are a pure function of the seed and the position."""

import itertools
from pathlib import Path

import pytest
import torch

from coral_core.errors import DataError
from coral_core.store.batches import Batch, _order, _rows, batches, collate
from coral_core.store.shard import Sample
from coral_core.store.store import Store
from tests.store.helpers import make_samples, make_store

T, F = True, False


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "data", make_samples(12), holdout=2, dtype=torch.bfloat16)


def take(store: Store, count: int, **options: int) -> list[Batch]:
    return list(itertools.islice(batches(store, batch_size=4, **options), count))


def same(left: Batch, right: Batch) -> bool:
    pairs = zip(vars(left).values(), vars(right).values(), strict=True)
    return all(b is None if a is None else torch.equal(a, b) for a, b in pairs)  # taps, where there are none


def test_padding_is_on_the_right_and_empty() -> None:
    short = Sample(torch.tensor([5]), torch.tensor([T]), torch.tensor([[1.0, 2.0]]))
    long = Sample(torch.tensor([7, 8, 9]), torch.tensor([F, T, T]), torch.ones(3, 2))
    batch = collate([short, long])
    assert batch.ids_BT.tolist() == [[5, 0, 0], [7, 8, 9]]
    assert batch.answer_BT.tolist() == [[T, F, F], [F, T, T]]
    assert batch.valid_BT.tolist() == [[T, F, F], [T, T, T]]
    assert batch.feature_BTD.tolist() == [[[1, 2], [0, 0], [0, 0]], [[1, 1], [1, 1], [1, 1]]]


def test_features_come_as_float32_unless_asked(store: Store) -> None:
    assert take(store, 1, seed=0)[0].feature_BTD.dtype == torch.float32
    (batch,) = itertools.islice(batches(store, batch_size=2, seed=0, dtype=torch.bfloat16), 1)
    assert batch.feature_BTD.dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_batches_and_another_does_not(store: Store) -> None:
    first, again, other = take(store, 6, seed=3), take(store, 6, seed=3), take(store, 6, seed=4)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("start", range(8))
def test_resuming_at_start_continues_exactly(store: Store, start: int) -> None:
    whole = take(store, 10, seed=1)
    rest = take(store, 10 - start, seed=1, start=start)
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 5), (3, 8), (1, 1)])
def test_every_epoch_sees_every_sample_once(count: int, size: int) -> None:
    stream = list(itertools.chain(*itertools.islice(_rows([range(count)], size, 0, 0), 10 * count)))
    epochs = [stream[first : first + count] for first in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_epochs_differ_in_order() -> None:
    stream = list(itertools.chain(*itertools.islice(_rows([range(20)], 4, 0, 0), 10)))
    assert stream[:20] != stream[20:]


def test_a_large_store_is_read_a_window_of_shards_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine shards of four, three open: every stretch of twelve stays within three shards, drawn anew each epoch."""
    monkeypatch.setattr("coral_core.store.batches.OPEN_SHARDS", 3)
    shards = [range(4 * number, 4 * number + 4) for number in range(9)]
    epochs = [_order(shards, 0, epoch) for epoch in range(3)]
    windows = []
    for order in epochs:
        assert sorted(order) == list(range(36))
        for first in (0, 12, 24):
            touched = {index // 4 for index in order[first : first + 12]}
            assert len(touched) == 3
            assert order[first : first + 12] != sorted(order[first : first + 12])
            windows.append(frozenset(touched))
    assert len(set(windows)) > 6
    stream = list(itertools.islice(_rows(shards, 5, 0, 0), 30))
    assert list(itertools.islice(_rows(shards, 5, 0, 11), 19)) == stream[11:]


def test_the_shards_to_train_on_end_before_the_held_out_samples(store: Store) -> None:
    assert store.train_shards == [range(0, 5), range(5, 10)]
    assert [index for shard in store.train_shards for index in shard] == list(store.train_indices)


def test_held_out_samples_never_come(store: Store) -> None:
    held = {tuple(store[index].ids_T.tolist()) for index in store.holdout_indices}
    for batch in take(store, 20, seed=0):
        for ids_T, valid_T in zip(batch.ids_BT, batch.valid_BT, strict=True):
            assert tuple(ids_T[valid_T].tolist()) not in held


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    store = make_store(tmp_path / "data", make_samples(2), holdout=2)
    with pytest.raises(DataError, match=r"no dialogue to train on\. Lower data\.holdout"):
        next(batches(store, batch_size=1, seed=0))
