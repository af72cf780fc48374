"""A cache with a length: preallocated rows, appended to, thinned and cut without ever moving what is kept in place.

A worked example, five rows of which three are committed and two are drafted siblings:

    append(a b c)      rows a b c . .      length 3
    append(x y)        rows a b c x y      length 5      (a tree: x and y are both children of c)
    keep([1], 3)       rows a b c y .      length 4      (row 1 after position 3 was accepted)
    truncate(3)        rows a b c . .      length 3
    reserve(8)         rows a b c . . . . .

A cache may have several seats, for answers side by side; `seat` is one of them as a cache of its own, on the same
storage. Answers differ in length, so that a pass over several writes to other columns in each seat, as `place` says:

    seat 0   a b c d x y .      new rows x y at columns 4 5
    seat 1   a b x y . . .      new rows x y at columns 2 3

A recorded forward (recorded.py), whose shapes may not depend on the length, is told its columns in the same way.

Layers that look alike share one block of memory, so that a path is kept in all of them by one gather: with a storage
each, 24 layers took 160 small operations a round, and 32 would take some 130 launches on a GPU.
Axes: L layer (keys of the first, its values, keys of the second, ...), B batch: a seat each, J key/value head, T
position of a new row, K cached column, E head dimension, N row that is kept, X any axes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

LEAST_ROWS = 256


def rounded_rows(rows: int) -> int:
    """A number of rows of which there are few, and which is little more than `rows`.

    Powers of two up to 2,048, then in steps of an eighth of one:

        300 → 512,   1,500 → 2,048,   2,100 → 2,304,   5,000 → 5,120
    """
    if rows <= 8 * LEAST_ROWS:
        return max(LEAST_ROWS, 1 << (rows - 1).bit_length())
    unit = 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // unit) * unit


class Slots(CacheLayerMixin):
    """Keys and values of one layer. Every row is kept, in sliding layers too: the mask hides, the cache never drops."""

    is_sliding = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.seats = capacity, 1
        self.length = 0
        self.placed: tuple[torch.Tensor, int, torch.Tensor | None] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate once the first rows show heads, width, dtype and device."""
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def _empty(self, states_BJTE: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = states_BJTE.shape
        return states_BJTE.new_zeros(self.seats, heads, self.capacity, width)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows [B,J,T,E] and return all rows [B,J,K,E], as views; or write them where `place` said."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.placed is not None:
            return self._write(self.keys, key_states), self._write(self.values, value_states)
        end = self.length + key_states.shape[-2]
        assert end <= self.capacity, f"cache of {self.capacity} rows cannot hold {end}"
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _write(self, whole_BJKE: torch.Tensor, states_BJTE: torch.Tensor) -> torch.Tensor:
        """Rows to the columns that `place` said, of the first seats; these seats' columns that are read."""
        assert self.placed is not None
        column_XT, end, seat_B = self.placed
        if column_XT.dim() == 1:
            whole_BJKE.index_copy_(2, column_XT, states_BJTE)
            return whole_BJKE[:, :, :end]
        batch = states_BJTE.shape[0]
        rows_B = torch.arange(batch, device=column_XT.device) if seat_B is None else seat_B
        whole_BJKE[rows_B[:, None], :, column_XT] = states_BJTE.transpose(1, 2)
        return whole_BJKE[:batch, :, :end] if seat_B is None else whole_BJKE[:, :, :end].index_select(0, seat_B)

    @contextlib.contextmanager
    def place(self, column_XT: torch.Tensor, end: int, seat_B: torch.Tensor | None = None) -> Iterator[None]:
        """Within, new rows go to these columns and are read with all below `end`; `length` stays as it is.

        The columns are [T] of the only seat, or [B,T] of the seats in `seat_B`; without it, of the first ones, which
        are read in place.
        """
        assert end <= self.capacity, f"cache of {self.capacity} rows has no column {end - 1}"
        self.placed = column_XT, end, seat_B
        try:
            yield
        finally:
            self.placed = None

    def keep(self, rows_N: torch.Tensor, start: int) -> None:
        """Of the rows from `start` on, keep the given ones (ascending, counted from `start`), in that order."""
        end = start + rows_N.numel()
        for states in (self.keys, self.values):
            if states is not None:  # a layer that reads another's rows has none (Gemma 4)
                states[:, :, start:end] = states[:, :, start : self.length].index_select(2, rows_N)
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget every row from `length` on."""
        assert length <= self.length or self.keys is None, "a layer that reads another's rows counts none (Gemma 4)"
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Make room for at least `capacity` rows; what is held is copied once."""
        if capacity <= self.capacity:
            return
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _grown(self.keys, 2, capacity), _grown(self.values, 2, capacity)
        self.capacity = capacity

    @property
    def storage(self) -> torch.Tensor | None:
        """What the rows are kept in; another tensor once there is room for more, and none before the first rows."""
        return self.keys

    def get_seq_length(self) -> int:
        return self.placed[1] if self.placed else self.length

    def get_max_length(self) -> int:
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.placed[1] if self.placed else self.length + query_length), 0


class SlotCache(Cache):
    """The target's cache: one `Slots` per layer, what a Hugging Face model takes as its cache."""

    whole: "SlotCache | None" = None
    """Of one seat: the cache that it is a part of."""
    _block_LBJKE: torch.Tensor | None = None
    """What all layers' keys and values are views of; none before the first rows, nor where layers differ in shape."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[Slots(capacity) for _ in range(layers)])
        self._seats: dict[int, SlotCache] = {}
        """The seats that were asked for."""

    @property
    def length(self) -> int:
        """Rows held."""
        return self.layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    @property
    def storage(self) -> torch.Tensor | None:
        """`Slots.storage` of the first layer: the others' move with it."""
        storage: torch.Tensor | None = self.layers[0].storage
        return storage

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self.layers[0].capacity

    def seat(self, number: int) -> "SlotCache":
        """One seat as the cache of one answer, with a length of its own, on this cache's storage.

        There are as many as were asked for, in powers of two: a server of 16 places answered a single client's first
        token 40 ms later where all were made at once (pico, one core).
        """
        if number >= self.layers[0].seats:
            self._widen(1 << number.bit_length())
        if number not in self._seats:
            self._seats[number] = SlotCache(len(self.layers), self.capacity)
            self._seats[number].whole = self
            self._point(number)
        return self._seats[number]

    def _widen(self, seats: int) -> None:
        """Make room for so many answers; what is held is copied once."""
        if self._block_LBJKE is not None:
            self._block_LBJKE = _grown(self._block_LBJKE, 1, seats)
        for number, layer in enumerate(self.layers):
            layer.seats = seats
            if self._block_LBJKE is not None and layer.is_initialized:
                self._view(number, self._block_LBJKE)
            elif layer.is_initialized:
                layer.keys, layer.values = _grown(layer.keys, 0, seats), _grown(layer.values, 0, seats)
        for number in self._seats:
            self._point(number)

    def _point(self, number: int) -> None:
        """Point one seat at the storage as it is now."""
        seat, block_LBJKE = self._seats[number], self._block_LBJKE
        seat._block_LBJKE = None if block_LBJKE is None else block_LBJKE[:, number : number + 1]
        for own, part in zip(self.layers, seat.layers, strict=True):
            part.capacity, part.is_initialized = own.capacity, own.is_initialized
            if own.is_initialized:
                part.keys, part.values = own.keys[number : number + 1], own.values[number : number + 1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Slots.update` of one layer."""
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            (self if self.whole is None else self.whole)._allot(layer_idx, key_states, value_states)
        rows: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states)
        return rows

    def _allot(self, number: int, key_BJTE: torch.Tensor, value_BJTE: torch.Tensor) -> None:
        """Storage for a layer that has none yet: in the block, if it looks like the first one."""
        layer = self.layers[number]
        _, heads, _, width = key_BJTE.shape
        shape = (layer.seats, heads, layer.capacity, width)
        if not any(other.is_initialized for other in self.layers):
            self._block_LBJKE = key_BJTE.new_zeros(2 * len(self.layers), *shape)
        block_LBJKE = self._block_LBJKE
        if block_LBJKE is not None:
            alike = block_LBJKE.shape[1:] == shape and key_BJTE.shape == value_BJTE.shape
            if alike and (block_LBJKE.dtype, block_LBJKE.device) == (value_BJTE.dtype, value_BJTE.device):
                self._view(number, block_LBJKE)
            else:
                self._separate()
        if not layer.is_initialized:
            layer.lazy_initialization(key_BJTE, value_BJTE)
        for seat in self._seats:
            self._point(seat)

    def _view(self, number: int, block_LBJKE: torch.Tensor) -> None:
        layer = self.layers[number]
        layer.keys, layer.values = block_LBJKE[2 * number], block_LBJKE[2 * number + 1]
        layer.is_initialized = True

    def _separate(self) -> None:
        """Give every layer storage of its own."""
        self._block_LBJKE = None
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    @contextlib.contextmanager
    def place(self, column_XT: torch.Tensor, end: int, seat_B: torch.Tensor | None = None) -> Iterator[None]:
        """`Slots.place` in every layer."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.place(column_XT, end, seat_B))
            yield

    def keep(self, rows_N: torch.Tensor, start: int) -> None:
        """`Slots.keep` in every layer."""
        if self._block_LBJKE is None:
            for layer in self.layers:
                layer.keep(rows_N, start)
            return
        end = start + rows_N.numel()
        kept_LBJNE = self._block_LBJKE[:, :, :, start : self.length].index_select(3, rows_N)
        self._block_LBJKE[:, :, :, start:end] = kept_LBJNE
        self.length = end

    def truncate(self, length: int) -> None:
        """`Slots.truncate` in every layer."""
        for layer in self.layers:
            layer.truncate(length)

    def wipe(self, length: int) -> None:
        """Forget every row from `length` on, and what was in it: where that is no number, hiding it is not enough."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[:, :, length:], layer.values[:, :, length:] = 0, 0
        self.truncate(length)

    def move(self, source: int, target: int) -> None:
        """Give the rows of one seat to another."""
        length = self.seat(source).length
        filled = [layer for layer in self.layers if length and layer.is_initialized]
        for states_BJKE in (states for layer in filled for states in (layer.keys, layer.values)):
            states_BJKE[target, :, :length] = states_BJKE[source, :, :length]
        self.seat(target).length = length

    def reserve(self, capacity: int) -> None:
        """`Slots.reserve` in every layer; of a cache with seats, for all of them."""
        if capacity <= self.capacity:
            return
        if self.whole is not None:
            self.whole.reserve(rounded_rows(capacity))  # few steps: every one copies all seats
            return
        if self._block_LBJKE is not None:
            self._block_LBJKE = _grown(self._block_LBJKE, 3, capacity)
        for number, layer in enumerate(self.layers):
            if self._block_LBJKE is None:
                layer.reserve(capacity)
            layer.capacity = capacity
            if self._block_LBJKE is not None and layer.is_initialized:
                self._view(number, self._block_LBJKE)
        for seat in self._seats:
            self._point(seat)


def _grown(states_X: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """With one axis longer; what is new is 0."""
    grown_X = states_X.new_zeros(*states_X.shape[:axis], length, *states_X.shape[axis + 1 :])
    grown_X.narrow(axis, 0, states_X.shape[axis]).copy_(states_X)
    return grown_X
