"""Hidden rows times blocks of head rows: one small matrix product per block, the weights never copied.

Copying small blocks together first looked faster alone (sixteen blocks of 128 x 256, four rows: 0.23 ms against 0.28)
and was slower in a decoding round, whose verification has emptied the cache: 1.3 ms per level against 0.9.

Which kernel is fastest for a handful of rows was measured on an AMD EPYC (Zen 3, AVX2, 2 cores), float32, ms:

| weight        | rows | F.linear | weight @ hidden.T | oneDNN |
|---------------|-----:|---------:|------------------:|-------:|
| 4,000 x 4,096 |    1 |      3.6 |               3.0 |    2.0 |
| 4,000 x 4,096 |    4 |     10.4 |               3.2 |    4.2 |
| 4,000 x 4,096 |   10 |     13.4 |              11.0 |    6.4 |
| 2,048 x 256   |    4 |     0.16 |              0.28 |        |

oneDNN is reached by an activation in its own format; it costs about 0.1 ms per call, so it is for large blocks.
Axes: N row, D hidden, R head row of one block, C head row of all blocks.
"""

from collections.abc import Sequence

import torch

_LARGE = 1 << 20
"""Elements of a block from which oneDNN's fixed cost is repaid."""


def products(hidden_ND: torch.Tensor, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N,C]: the products of each row with all rows of all blocks, in the blocks' order.

    Each block [R,D] should be a contiguous slice. Equal to `hidden_ND @ torch.cat(blocks).T` but for rounding.
    """
    parts = [_product(hidden_ND, block_RD) for block_RD in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _product(hidden_ND: torch.Tensor, block_RD: torch.Tensor) -> torch.Tensor:
    rows = hidden_ND.shape[0]
    on_cpu = block_RD.device.type == "cpu" and block_RD.dtype == torch.float32
    if not on_cpu or rows > 16 or block_RD.numel() < _LARGE:
        return torch.nn.functional.linear(hidden_ND, block_RD)
    if (rows == 1 or rows > 4) and torch.backends.mkldnn.is_available():
        return torch.nn.functional.linear(hidden_ND.to_mkldnn(), block_RD).to_dense()
    return torch.mm(block_RD, hidden_ND.t()).t()
