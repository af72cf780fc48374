"""Products of few rows on a CPU, with weights in oneDNN's own layout.

A decoding round multiplies a handful of rows, where a plain product falls off a cliff between one row and a full batch.
Two cores of a Xeon (AVX-512, AMX), ms, a target of Qwen2.5-0.5B's shape behind 300 rows, its linear layers plain and
packed, the median of 11 forwards in turns:

| rows              |   1 |   2 |   4 |   9 |  17 |  33 |
|-------------------|----:|----:|----:|----:|----:|----:|
| float32, plain    | 117 | 218 | 201 | 217 | 222 | 283 |
|   packed          |  79 |  77 |  76 |  81 | 109 | 164 |
| bfloat16, plain   |  60 |  61 |  66 |  76 |  94 | 132 |
|   packed          |  47 |  47 |  48 |  52 |  65 | 106 |

The layout is a second copy of the weights, made when it is first wanted. The plain ones stay for full batches, which
gain a fifth at most (1,024 rows: 1.20 times in float32, 1.04 in bfloat16), for training, and for saving the model.
Axes: N row, I input, O output.
"""

import functools
import warnings
from typing import Any

import psutil
import torch
from torch import nn

FEW_ROWS = 256
"""Rows up to which the packed weights serve. By number alone, so that the same call always rounds the same way."""
FILL, LARGE = 4, 1 << 20
"""Fewer rows are filled up to FILL where a weight has LARGE elements: the kernel is faster with rows nobody wants."""
SPARE = 0.5
"""Of the memory that is free, the most that a model's second copy may take."""


def packs(weight_OI: torch.Tensor) -> bool:
    """Whether oneDNN has a packed product for such weights on this processor."""
    return weight_OI.device.type == "cpu" and weight_OI.dtype in _dtypes()


@functools.cache
def _dtypes() -> set[torch.dtype]:
    """What this processor multiplies packed; asked once, since every layer of every step wants to know."""
    if not torch.backends.mkldnn.is_available():
        return set()
    return {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())


def serves(x_XI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether these are few rows for weights that are packed. Gradients and autocasting are for plain layers."""
    few = x_XI.numel() <= FEW_ROWS * x_XI.shape[-1]
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    return few and not plain and packs(weight_OI)


class Packed:
    """One weight, packed."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), FILL)
        self.large = weight_OI.numel() >= LARGE

    def linear(self, x_XI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        """As nn.functional.linear: [...,O] of [...,I]."""
        rows = x_XI.numel() // x_XI.shape[-1]
        if not self.large or rows >= FILL:
            return self._product(x_XI, bias_O)
        filled_NI = nn.functional.pad(x_XI.reshape(rows, -1), (0, 0, 0, FILL - rows))
        return self._product(filled_NI, bias_O)[:rows].unflatten(0, x_XI.shape[:-1])

    def _product(self, x_XI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        out_XO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x_XI, self.weight, bias_O, "none", [], "")
        return out_XO


class PackedLinear(nn.Linear):
    """An nn.Linear that is packed for few rows, where no gradient is wanted."""

    _packed: Packed | None = None
    _packed_from: tuple[int, int] | None = None
    """Address and version of the weight that was packed: a weight that was moved or trained since is packed anew."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight_OI = self.weight
        if not serves(input, weight_OI):
            return super().forward(input)
        origin = weight_OI.data_ptr(), weight_OI._version
        if self._packed is None or self._packed_from != origin:
            self._packed, self._packed_from = Packed(weight_OI), origin
        return self._packed.linear(input, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is packed, which can neither be copied nor stored."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


def pack(model: nn.Module) -> None:
    """Let the linear layers of a model multiply few rows packed, where memory has room for a second copy of them."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and packs(module.weight)]
    wanted, free = sum(linear.weight.nbytes for linear in linears), psutil.virtual_memory().available
    if wanted > SPARE * free:
        warnings.warn(
            f"decoding is slower than it could be: {wanted / 2**30:.1f} GiB of weights are packed only where twice as "
            f"much memory is free, and {free / 2**30:.1f} GiB are",
            stacklevel=2,
        )
        return
    for linear in linears:
        linear.__class__ = PackedLinear
