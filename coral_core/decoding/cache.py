"""A cache with a length: preallocated rows, appended to, thinned and cut without ever moving what is kept in place.

A worked example, five rows of which three are committed and two are drafted siblings:

    append(a b c)      rows a b c . .      length 3
    append(x y)        rows a b c x y      length 5      (a tree: x and y are both children of c)
    keep([1], 3)       rows a b c y .      length 4      (row 1 after position 3 was accepted)
    truncate(3)        rows a b c . .      length 3
    reserve(8)         rows a b c . . . . .

For a recorded forward (graphs.py), whose shapes may not depend on the length, `place` says in a tensor where the next
rows go.

Layers that look alike share one block of memory, so that a path is kept in all of them by one gather: with a storage
each, 24 layers took 160 small operations a round, and 32 would take some 130 launches on a GPU.
Axes: L layer's keys, then its values, B batch, G key/value head, K cached position, E head dimension.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from coral_core.decoding.graphs import Graphs


class Slots(CacheLayerMixin):
    """Keys and values of one layer. Every row is kept, in sliding layers too: the mask hides, the cache never drops."""

    is_sliding = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, capacity: int, graphs: Graphs | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.graphs = graphs
        """Recordings of forwards over this storage; none where forwards run as they come."""
        self.placed: tuple[torch.Tensor, int] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate once the first rows show heads, width, dtype and device."""
        for name, states_BGTE in (("keys", key_states), ("values", value_states)):
            batch, heads, _, width = states_BGTE.shape
            setattr(self, name, states_BGTE.new_zeros(batch, heads, self.capacity, width))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows [B,G,T,E] and return all rows [B,G,K,E], as views; or write them where `place` said."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.placed is not None:
            column_T, end = self.placed
            self.keys.index_copy_(2, column_T, key_states)
            self.values.index_copy_(2, column_T, value_states)
            return self.keys[:, :, :end], self.values[:, :, :end]
        end = self.length + key_states.shape[-2]
        assert end <= self.capacity, f"cache of {self.capacity} rows cannot hold {end}"
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @contextlib.contextmanager
    def place(self, column_T: torch.Tensor, end: int) -> Iterator[None]:
        """Within, new rows go to these columns and are read with all below `end`; `length` stays as it is."""
        assert end <= self.capacity, f"cache of {self.capacity} rows has no column {end - 1}"
        self.placed = column_T, end
        try:
            yield
        finally:
            self.placed = None

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
        if self.graphs is not None:
            self.graphs.forget()
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
    """The target's cache: one `Slots` per layer, what a Hugging Face model takes as its cache."""

    _block_LBGKE: torch.Tensor | None = None
    """What all layers' keys and values are views of; none before the first rows, nor where layers differ in shape."""

    def __init__(self, layers: int, capacity: int, graphs: Graphs | None = None) -> None:
        super().__init__(layers=[Slots(capacity) for _ in range(layers)])
        self.graphs = graphs
        """As in `Slots`."""

    @property
    def length(self) -> int:
        """Rows held."""
        return self.layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self.layers[0].capacity

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Slots.update` of one layer."""
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            self._place(layer_idx, key_states, value_states)
        rows: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states)
        return rows

    def _place(self, number: int, key_BGTE: torch.Tensor, value_BGTE: torch.Tensor) -> None:
        """Storage for a layer that has none yet, if it looks like the first one."""
        layer = self.layers[number]
        batch, heads, _, width = key_BGTE.shape
        shape = (batch, heads, layer.capacity, width)
        if not any(other.is_initialized for other in self.layers):
            self._block_LBGKE = key_BGTE.new_zeros(2 * len(self.layers), *shape)
        block_LBGKE = self._block_LBGKE
        if block_LBGKE is None:
            return
        alike = block_LBGKE.shape[1:] == shape and key_BGTE.shape == value_BGTE.shape
        if alike and (block_LBGKE.dtype, block_LBGKE.device) == (value_BGTE.dtype, value_BGTE.device):
            self._view(number, block_LBGKE)
        else:
            self._part()

    def _view(self, number: int, block_LBGKE: torch.Tensor) -> None:
        layer = self.layers[number]
        layer.keys, layer.values = block_LBGKE[2 * number], block_LBGKE[2 * number + 1]
        layer.is_initialized = True

    def _part(self) -> None:
        """Every layer for itself."""
        self._block_LBGKE = None
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    @contextlib.contextmanager
    def place(self, column_T: torch.Tensor, end: int) -> Iterator[None]:
        """`Slots.place` in every layer."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.place(column_T, end))
            yield

    def keep(self, rows_N: torch.Tensor, start: int) -> None:
        """`Slots.keep` in every layer."""
        if self._block_LBGKE is None:
            for layer in self.layers:
                layer.keep(rows_N, start)
            return
        end = start + rows_N.numel()
        kept_LBGNE = self._block_LBGKE[:, :, :, start : self.length].index_select(3, rows_N)
        self._block_LBGKE[:, :, :, start:end] = kept_LBGNE
        self.length = end

    def truncate(self, length: int) -> None:
        """`Slots.truncate` in every layer."""
        for layer in self.layers:
            layer.truncate(length)

    def reserve(self, capacity: int) -> None:
        """`Slots.reserve` in every layer."""
        if self.graphs is not None and capacity > self.capacity:
            self.graphs.forget()
        old_LBGKE = self._block_LBGKE
        if old_LBGKE is None or capacity <= old_LBGKE.shape[3]:
            for layer in self.layers:
                layer.reserve(capacity)
            return
        sides, batch, heads, _, width = old_LBGKE.shape
        block_LBGKE = old_LBGKE.new_zeros(sides, batch, heads, capacity, width)
        block_LBGKE[:, :, :, : self.length] = old_LBGKE[:, :, :, : self.length]
        self._block_LBGKE = block_LBGKE
        for number, layer in enumerate(self.layers):
            layer.capacity = capacity
            self._view(number, block_LBGKE)
