"""Forwards on a CPU whose rows have the same bits whatever else is read with them.

Products of one, of two or three, and of four and more rows round differently; so do activations at the end of what a
thread computes, which is less than a vector. A forward is therefore filled up with copies of its last row; attention
is exact.py's. Rows that only fill up are not kept in the cache.
Axes: B batch, T position of a row, J key/value head, E head dimension.
"""

from typing import Any

import torch

from coral_core.kernels import exact

LEAST_ROWS = 4
"""Fewer rows are multiplied in another order."""
VECTOR = 64
"""Numbers that are computed together, at most."""
GRAIN = 1 << 15
"""Numbers for which PyTorch takes a further thread."""

Mask = torch.Tensor | dict[str, torch.Tensor] | None


def filled_rows(rows: int, batch: int, width: int, threads: int) -> int:
    """The number of rows of each of a batch's answers, such that no thread computes a part of a vector.

    `width` is that of the activations. Counts that are multiples of few vectors need no filling:

        1 row of 1,536 → 4,   9 of 4,864 → 9,   9 of 48 → 12
    """
    while not _whole(rows * batch, width, threads):
        rows += 1
    return rows


def _whole(rows: int, width: int, threads: int) -> bool:
    numbers = rows * width
    part = -(-numbers // min(threads, -(-numbers // GRAIN)))
    return rows >= LEAST_ROWS and part % VECTOR == 0


class Filled:
    """A cache for one forward: it keeps the first rows, in float32, and not those that fill up."""

    def __init__(self, cache: Any, rows: int) -> None:
        self._cache, self._rows = cache, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __len__(self) -> int:
        return len(self._cache)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the cache's own."""
        key_BJTE, value_BJTE = key_states[:, :, : self._rows], value_states[:, :, : self._rows]
        rows: tuple[torch.Tensor, torch.Tensor] = self._cache.update(
            key_BJTE.float(), value_BJTE.float(), *args, **kwargs
        )
        return rows


def masks(position_BT: torch.Tensor, mask: Mask, kinds: tuple[str, ...]) -> Mask:
    """In the place of each mask one that carries its layout to the layers; they do not read it otherwise."""
    if isinstance(mask, dict):
        return {kind: _carrier(position_BT, own) for kind, own in mask.items()}
    carrier = _carrier(position_BT, mask)
    return dict.fromkeys(kinds, carrier) if len(kinds) > 1 else carrier


def _carrier(position_BT: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    carrier = torch.zeros(1, 1, 1, 1)
    carrier.columns = exact.layout(position_BT, mask)  # type: ignore[attr-defined]
    return carrier
