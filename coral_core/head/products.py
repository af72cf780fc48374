"""Hidden rows times blocks of head rows: one small matrix product per block, the weights never copied in a call.

On a CPU, large blocks are kept in oneDNN's own layout, which reads them at the speed of memory for a handful of rows.
12 blocks of 2,004 x 4,096 on an AMD EPYC (Zen 4, 2 cores, 54 GB/s at most), GB/s of weights:

| rows              |    1 |    2 |    4 |    6 |   10 |   16 |
|-------------------|-----:|-----:|-----:|-----:|-----:|-----:|
| float32, packed   | 26.8 | 24.6 | 32.3 | 31.2 | 26.2 | 21.2 |
| bfloat16, packed  | 26.9 | 24.9 | 30.6 | 32.9 | 26.7 | 21.0 |

With one core, F.linear on the plain blocks read 22 (float32) and 17 (bfloat16) at one row, 11 and 12 at four, where
packed ones read 17, 17 and 24, 24. So fewer than four rows are filled up to four: the kernel is faster with rows that
nobody wants. A call costs 0.015 ms, three times F.linear's, so that small blocks stay plain slices, neighbours joined.

On one core of a Xeon (AVX-512, AMX) beside other work, where the largest element of a buffer is found at 10 GB/s:

| rows              |    1 |    2 |    4 |    8 |   10 |
|-------------------|-----:|-----:|-----:|-----:|-----:|
| float32, plain    | 14.7 | 14.1 |  8.3 |  6.2 |  5.1 |
| float32, packed   |  9.7 |  9.7 |  9.7 |  8.4 |  8.1 |
| bfloat16, packed  |  9.7 |  9.8 |  9.8 |  9.6 |  9.6 |

So in float32 the plain rows are kept as well, for one row and two. And with less than 256 rows of 4,096 in a block
nothing else is: 4,000 rows in blocks of 125, 250, 500 and 1,000, 10 hidden rows, two cores of a Xeon, ms: plain 4.8,
5.6, 6.9, 7.3, packed 5.5, 5.0, 4.4, 4.1. In bfloat16 packed wins at each of these sizes (2.6 against 3.0 at 125).
Axes: N row, D hidden, R head row of one block, V head row of all blocks, C head row of the active blocks.
"""

from collections.abc import Sequence

import torch

from coral_core.head.groups import runs
from coral_core.packed import FILL, Packed, packs

_LARGE = {torch.float32: 1 << 20, torch.bfloat16: 1 << 18}
"""Elements of a block from which the packed layout repays its cost per call."""
_FEW = 2
"""Rows up to which float32 reads plain blocks faster."""


class Blocks:
    """Head rows [V,D], cut at `start_G` into blocks; multiplied a few blocks at a time."""

    def __init__(self, rows_VD: torch.Tensor, start_G: Sequence[int]) -> None:
        self.start_G = list(start_G)
        self.packed: list[Packed] = []
        self.rows_VD: torch.Tensor | None = None
        """The plain rows, where some call is faster with them."""
        largest = max(end - first for first, end in zip(self.start_G, self.start_G[1:], strict=False))
        if packs(rows_VD) and largest * rows_VD.shape[1] >= _LARGE[rows_VD.dtype]:
            for first, end in zip(self.start_G, self.start_G[1:], strict=False):
                block_RD = rows_VD[first:end].contiguous()
                self.packed.append(Packed(block_RD))
        if not self.packed or rows_VD.dtype == torch.float32:
            self.rows_VD = rows_VD.contiguous()

    def products(self, hidden_ND: torch.Tensor, active: Sequence[int]) -> torch.Tensor:
        """[N,C]: the products of each row with all rows of the active blocks, in the vocabulary's permuted order.

        Equal to `hidden_ND @ torch.cat(blocks).T` but for rounding.
        """
        rows = hidden_ND.shape[0]
        if self.rows_VD is not None and (rows <= _FEW or not self.packed):
            spans = runs(active, self.start_G)
            return _joined([torch.nn.functional.linear(hidden_ND, self.rows_VD[first:end]) for first, end in spans])
        if rows < FILL:
            hidden_ND = torch.nn.functional.pad(hidden_ND, (0, 0, 0, FILL - rows))
        return _joined([self.packed[group].linear(hidden_ND) for group in sorted(active)])[:rows]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
