"""The cache of several answers side by side: one preallocated storage, in which each answer has a seat.

Answers differ in length, so that a batch's new rows go to columns of their own in each seat:

    seat 0   a b c d x y .      new rows x y at columns 4 5
    seat 1   a b x y . . .      new rows x y at columns 2 3

A prompt is read into its seat alone, by the code for one answer: `seat` lends a view that is a `Slots`.
Axes: B seat, G key/value head, T new row, A kept row, K cached position, E head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from coral_core.decoding.cache import SlotCache, Slots


class SeatSlots(CacheLayerMixin):
    """Keys and values of one layer, for a number of seats. It holds no lengths: who places rows knows them."""

    is_sliding = False
    is_initialized: bool
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, seats: int, capacity: int) -> None:
        super().__init__()
        self.seats, self.capacity, self.end = seats, capacity, 0
        self.column_BT: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate once the first rows show heads, width, dtype and device."""
        if self.is_initialized:
            return
        for name, states_BGTE in (("keys", key_states), ("values", value_states)):
            _, heads, _, width = states_BGTE.shape
            setattr(self, name, states_BGTE.new_zeros(self.seats, heads, self.capacity, width))
        self.is_initialized = True

    def place(self, column_BT: torch.Tensor, end: int) -> None:
        """Where the next rows go, in the first B seats; attention then reads the columns below `end`."""
        assert end <= self.capacity, f"seats of {self.capacity} rows cannot hold {end}"
        self.column_BT, self.end = column_BT, end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows [B,G,T,E] where `place` said; all columns [B,G,K,E] of these seats, as views."""
        assert self.keys is not None and self.values is not None and self.column_BT is not None
        batch = key_states.shape[0]
        seat_B1 = _numbers(batch, self.column_BT)
        for whole, states_BGTE in ((self.keys, key_states), (self.values, value_states)):
            whole[seat_B1, :, self.column_BT] = states_BGTE.transpose(1, 2)
        return self.keys[:batch, :, : self.end], self.values[:batch, :, : self.end]

    def keep(self, source_BA: torch.Tensor, target_BA: torch.Tensor) -> None:
        """Copy rows from column to column within each of the first B seats."""
        assert self.keys is not None and self.values is not None
        seat_B1 = _numbers(source_BA.shape[0], source_BA)
        for whole in (self.keys, self.values):
            whole[seat_B1, :, target_BA] = whole[seat_B1, :, source_BA]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` rows of one seat to another."""
        assert self.keys is not None and self.values is not None
        for whole in (self.keys, self.values):
            whole[target, :, :length] = whole[source, :, :length]

    def seat(self, number: int) -> Slots:
        """An empty seat as the cache of one answer; what is written to it stays here."""
        return _Seat(self, number)

    def get_seq_length(self) -> int:
        return self.end

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0


class _Seat(Slots):
    """One seat, as a batch of one."""

    def __init__(self, whole: SeatSlots, number: int) -> None:
        super().__init__(whole.capacity)
        self.whole, self.number = whole, number

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.whole.lazy_initialization(key_states, value_states)
        assert self.whole.keys is not None and self.whole.values is not None
        self.keys = self.whole.keys[self.number : self.number + 1]
        self.values = self.whole.values[self.number : self.number + 1]
        self.is_initialized = True


class _SeatCache(SlotCache):
    """One seat of every layer."""

    def __init__(self, layers: Sequence[Slots]) -> None:
        Cache.__init__(self, layers=list(layers))

    def _place(self, number: int, key_BGTE: torch.Tensor, value_BGTE: torch.Tensor) -> None:
        """A seat's storage is the batch's."""


class BatchCache(Cache):
    """The target's cache for a batch: `SeatSlots` per layer."""

    def __init__(self, layers: int, seats: int, capacity: int) -> None:
        super().__init__(layers=[SeatSlots(seats, capacity) for _ in range(layers)])

    def place(self, column_BT: torch.Tensor, end: int) -> None:
        """`SeatSlots.place` in every layer."""
        for layer in self.layers:
            layer.place(column_BT, end)

    def keep(self, source_BA: torch.Tensor, target_BA: torch.Tensor) -> None:
        """`SeatSlots.keep` in every layer."""
        for layer in self.layers:
            layer.keep(source_BA, target_BA)

    def move(self, source: int, target: int, length: int) -> None:
        """`SeatSlots.move` in every layer."""
        for layer in self.layers:
            layer.move(source, target, length)

    def seat(self, number: int) -> SlotCache:
        """An empty seat as the cache of one answer."""
        return _SeatCache([layer.seat(number) for layer in self.layers])


def _numbers(batch: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(batch, device=like.device)[:, None]
