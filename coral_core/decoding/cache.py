"""A cache with a length: preallocated rows, appended to, thinned and cut without ever moving what is kept in place.

A worked example, five rows of which three are committed and two are drafted siblings:

    append(a b c)      rows a b c . .      length 3
    append(x y)        rows a b c x y      length 5      (a tree: x and y are both children of c)
    keep([1], 3)       rows a b c y .      length 4      (row 1 after position 3 was accepted)
    truncate(3)        rows a b c . .      length 3
    reserve(8)         rows a b c . . . . .

Axes: B batch, G key/value head, K cached position, E head dimension.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class Slots(CacheLayerMixin):
    """Keys and values of one layer. Every row is kept, in sliding layers too: the mask hides, the cache never drops."""

    is_sliding = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate once the first rows show heads, width, dtype and device."""
        for name, states_BGTE in (("keys", key_states), ("values", value_states)):
            batch, heads, _, width = states_BGTE.shape
            setattr(self, name, states_BGTE.new_zeros(batch, heads, self.capacity, width))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows [B,G,T,E] and return all rows [B,G,K,E], as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[-2]
        assert end <= self.capacity, f"cache of {self.capacity} rows cannot hold {end}"
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows_N: torch.Tensor, start: int) -> None:
        """Of the rows from `start` on, keep the given ones (ascending, counted from `start`), in that order."""
        assert self.keys is not None and self.values is not None
        end = start + rows_N.numel()
        for states in (self.keys, self.values):
            states[:, :, start:end] = states[:, :, start : self.length].index_select(2, rows_N)
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget every row from `length` on."""
        assert length <= self.length
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Make room for at least `capacity` rows; what is held is copied once."""
        if capacity <= self.capacity:
            return
        keys, values = self.keys, self.values
        if keys is not None and values is not None:
            self.keys, self.values = self._grown(keys, capacity), self._grown(values, capacity)
        self.capacity = capacity

    def _grown(self, states_BGKE: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, width = states_BGKE.shape
        grown_BGKE = states_BGKE.new_zeros(batch, heads, capacity, width)
        grown_BGKE[:, :, : self.length] = states_BGKE[:, :, : self.length]
        return grown_BGKE

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class SlotCache(Cache):
    """The target's cache: one `Slots` per layer, what a Hugging Face model takes as `past_key_values`."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[Slots(capacity) for _ in range(layers)])

    @property
    def length(self) -> int:
        """Rows held."""
        return self.layers[0].length

    def keep(self, rows_N: torch.Tensor, start: int) -> None:
        """`Slots.keep` in every layer."""
        for layer in self.layers:
            layer.keep(rows_N, start)

    def truncate(self, length: int) -> None:
        """`Slots.truncate` in every layer."""
        for layer in self.layers:
            layer.truncate(length)

    def reserve(self, capacity: int) -> None:
        """`Slots.reserve` in every layer."""
        for layer in self.layers:
            layer.reserve(capacity)
