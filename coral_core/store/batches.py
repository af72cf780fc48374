"""Batches for training: shuffled by a seed, and a pure function of (store, batch size, seed, position).

So a run that resumes at batch `start` sees exactly what the uninterrupted one saw; its state is that number.
Axes: B batch, T position, D hidden, I input width: the taps side by side.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from coral_core.errors import DataError
from coral_core.store.shard import Sample
from coral_core.store.store import OPEN_SHARDS, Store


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples padded on the right to one length."""

    ids_BT: torch.Tensor
    """int64; 0 on padding."""
    answer_BT: torch.Tensor
    """bool: the target wrote the token; False on padding."""
    valid_BT: torch.Tensor
    """bool: a token, not padding."""
    feature_BTD: torch.Tensor
    """The target's last hidden states; 0 on padding."""
    tap_BTI: torch.Tensor | None = None
    """Its taps side by side, 0 on padding, where the data hold some."""

    def read_by(self, *, taps: bool) -> torch.Tensor:
        """What a drafter reads: the taps, or the last hidden states."""
        assert self.tap_BTI is not None or not taps, "the data hold no taps"
        return self.tap_BTI if taps and self.tap_BTI is not None else self.feature_BTD


def collate(samples: Sequence[Sample], dtype: torch.dtype = torch.float32) -> Batch:
    """Pad samples on the right; features are cast to `dtype`."""
    valid = [torch.ones_like(sample.answer_T) for sample in samples]
    taps = [sample.tap_TI.to(dtype) for sample in samples if sample.tap_TI is not None]
    return Batch(
        ids_BT=pad_sequence([sample.ids_T for sample in samples], batch_first=True),
        answer_BT=pad_sequence([sample.answer_T for sample in samples], batch_first=True),
        valid_BT=pad_sequence(valid, batch_first=True),
        feature_BTD=pad_sequence([sample.feature_TD.to(dtype) for sample in samples], batch_first=True),
        tap_BTI=pad_sequence(taps, batch_first=True) if taps else None,
    )


def batch_of(store: Store, indices: Sequence[int], dtype: torch.dtype = torch.float32) -> Batch:
    """The samples with these indices, their features from the disk or, where there are none, from the target."""
    batch = collate([store[index] for index in indices], dtype)
    if batch.feature_BTD.shape[-1]:
        return batch
    assert store.tap is not None, f"{store.folder} holds no features, and was opened without a target"

    def kept(x_BTI: torch.Tensor) -> torch.Tensor:
        return x_BTI.to(batch.ids_BT.device, dtype).masked_fill(~batch.valid_BT[..., None], 0.0)

    feature_BTD, tap_BTI = store.tap(batch.ids_BT, batch.valid_BT)
    taps = None if tap_BTI is None else kept(tap_BTI)
    return dataclasses.replace(batch, feature_BTD=kept(feature_BTD), tap_BTI=taps)


def batches(
    store: Store, *, batch_size: int, seed: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """Batch `start`, `start` + 1, … of an endless run over the training samples, reshuffled every epoch.

    Every batch is full: one that reaches the end of an epoch goes on with the next. Raises DataError when nothing is
    left to learn from.
    """
    if not store.train_indices:
        raise DataError(f"{store.folder} holds no dialogue to train on. Lower data.holdout and run: coral prepare-data")
    for row in _rows(store.train_shards, batch_size, seed, start):
        yield batch_of(store, row, dtype)


def _rows(shards: Sequence[range], batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """The shards' indices, epoch after epoch, cut in rows of `batch_size`, from row `start` on."""
    epoch, skip = divmod(start * batch_size, sum(map(len, shards)))
    row: list[int] = []
    while True:
        for index in _order(shards, seed, epoch)[skip:]:
            row.append(index)
            if len(row) == batch_size:
                yield row
                row = []
        epoch, skip = epoch + 1, 0


def _order(shards: Sequence[range], seed: int, epoch: int) -> list[int]:
    """The epoch's permutation: of all samples, or, where the shards are more than stay open, of a window at a time.

    A window is as many shards as stay open, drawn anew each epoch: reading at random all over a store that is larger
    than memory would check and open a shard for almost every sample. Text seeds Python's generator by a hash; torch's
    would drop a seed's bits above 32.
    """
    draw, left = random.Random(f"{seed} {epoch}"), list(shards)
    if len(left) > OPEN_SHARDS:
        draw.shuffle(left)
    order: list[int] = []
    for first in range(0, len(left), OPEN_SHARDS):
        window = [index for shard in left[first : first + OPEN_SHARDS] for index in shard]
        draw.shuffle(window)
        order += window
    return order
