"""Hidden rows times blocks of head rows: one small matrix product per block, the weights never copied in a call.

On a CPU blocks are packed (layers.py), except small ones in float32. 32 of 256 blocks, ms on two cores of an AMD EPYC
(AVX-512), random blocks in turns:

| rows                            |    1 |    2 |    4 |   10 |
|---------------------------------|-----:|-----:|-----:|-----:|
| 125 x 4,096, float32, plain     |  3.6 |  5.1 |  7.9 | 10.1 |
|   packed                        |  2.9 |  2.9 |  2.8 |  3.8 |
| 125 x 4,096, bfloat16, plain    |  2.6 |  2.4 |  2.5 |  3.1 |
|   packed                        |  2.1 |  2.0 |  2.0 |  2.3 |

A call takes 0.01 ms before it multiplies, so that small float32 blocks stay plain, with neighbours joined. Packed over
plain: 16 of 64 x 256 2.5 at 1 row and 1.16 at 4, 32 of 128 x 256 1.45 and 0.78, of 125 x 896 0.96 and 0.54, of 62 x
2,048 1.53 and 0.66; a tree's levels have one row once and then several. On a Xeon (AVX-512, AMX) the first line was
4.8 at 10 rows, and packed 5.5. Fewer than four rows are filled up to four: the kernel is faster with rows that nobody
wants. Small blocks copied side by side, for one product, took twice as long as packed once they left the cache.

On a GPU the best tokens of the active groups are found in one pass over their rows, by a Triton kernel. Nothing there
waits for the device: which groups are active stays on it. The kernel is tested in Triton's interpreter against plain
PyTorch; it has not been run on a GPU yet.
Axes: N row, D hidden, V vocabulary in permuted order, G group, R place in a list: a head row of a block, an active
group, C candidate token: a head row of the active groups.
"""

import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence

import torch

from coral_core.kernels.layers import FILL, Packed, packs
from coral_core.lent import Lent

_LARGE = 1 << 15
"""Elements of a float32 block from which the packed layout repays its cost per call."""


class Blocks:
    """Head rows [V,D], cut at `start_G` into blocks; multiplied a few blocks at a time."""

    def __init__(self, rows_VD: torch.Tensor, start_G: Sequence[int]) -> None:
        self.start_G = list(start_G)
        blocks = [slice(first, end) for first, end in zip(self.start_G, self.start_G[1:], strict=False)]
        largest = max(block.stop - block.start for block in blocks) * rows_VD.shape[1]
        packed = packs(rows_VD) and (rows_VD.dtype != torch.float32 or largest >= _LARGE)
        self.packed = [Packed(rows_VD[block].contiguous()) for block in blocks] if packed else []
        self.rows_VD = None if packed else rows_VD.contiguous()
        """The plain rows, where they are not packed."""

    def products(self, hidden_ND: torch.Tensor, active: Sequence[int]) -> torch.Tensor:
        """[N,C]: the products of each row with all rows of the active blocks, in the vocabulary's permuted order.

        Equal to `hidden_ND @ torch.cat(blocks).T` but for rounding.
        """
        rows = hidden_ND.shape[0]
        if self.rows_VD is not None:
            spans = runs(active, self.start_G)
            return _joined([torch.nn.functional.linear(hidden_ND, self.rows_VD[first:end]) for first, end in spans])
        if rows < FILL:
            hidden_ND = torch.nn.functional.pad(hidden_ND, (0, 0, 0, FILL - rows))
        return _joined([self.packed[group].linear(hidden_ND) for group in sorted(active)])[:rows]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def runs(active: Iterable[int], start_G: list[int]) -> list[tuple[int, int]]:
    """Permuted rows of the active groups as (first, end), neighbours joined: fewer, larger products.

    With blocks of 10 rows, groups 7, 2, 3 are rows (20, 40) and (70, 80).
    """
    joined: list[tuple[int, int]] = []
    for group in sorted(active):
        first, end = start_G[group], start_G[group + 1]
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined


BEST = 16
"""Candidates that the kernel keeps of each tile of rows: no tree proposes more per node."""
MAX_ROWS = 64
"""Rows of one call that the kernel holds at once."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The logits of the most likely of the active rows; not sorted, and -inf where a tile had fewer."""

    logit_NC: torch.Tensor
    row_NC: torch.Tensor


def fits(lent: Lent, rows_VD: torch.Tensor) -> bool:
    """Whether the kernel serves this head: on a GPU with Triton, and logits that are plain products.

    Triton has no products of bfloat16 below compute capability 8.0 (T4, V100).
    """
    plain = lent.logit_scale == 1.0 and not lent.logit_softcap and rows_VD.shape[1] % 64 == 0
    if not plain or not rows_VD.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    return rows_VD.dtype != torch.bfloat16 or torch.cuda.get_device_capability(rows_VD.device) >= (8, 0)


def grouped_best(
    hidden_ND: torch.Tensor,
    rows_VD: torch.Tensor,
    start_G: torch.Tensor,
    chosen_NR: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> Best:
    """The best candidates among the rows of the chosen groups; group g is rows start_G[g] to start_G[g + 1].

    `chosen_NR` is [1,R] where all rows share their groups.
    """
    from coral_core.kernels.triton_blocks import launch

    parts = [slice(first, first + MAX_ROWS) for first in range(0, hidden_ND.shape[0], MAX_ROWS)]
    own = chosen_NR.shape[0] > 1
    found = [launch(hidden_ND[n], rows_VD, start_G, chosen_NR[n] if own else chosen_NR, bias_V) for n in parts]
    if len(found) == 1:
        return Best(*found[0])
    return Best(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))
