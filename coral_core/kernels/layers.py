"""A model's layers in faster forms: linear ones with weights in oneDNN's own layout, norms in one operation.

A decoding round multiplies a handful of rows, where a plain product falls off a cliff between one row and a full batch.
Two cores of an AMD EPYC (AVX-512), ms, a target of Qwen2.5-0.5B's shape behind 300 rows, its linear layers plain and
packed, the median of 11 forwards in turns:

| rows              |   1 |   2 |   4 |   9 |  17 |  33 |
|-------------------|----:|----:|----:|----:|----:|----:|
| float32, plain    | 117 | 218 | 201 | 217 | 222 | 283 |
|   packed          |  79 |  77 |  76 |  81 | 109 | 164 |
| bfloat16, plain   |  60 |  61 |  66 |  76 |  94 | 132 |
|   packed          |  47 |  47 |  48 |  52 |  65 | 106 |

The layout is a second copy of the weights, made when it is first wanted. It serves any number of rows, so that a row
has the same bits in a prompt and in a step (1,024 rows: 1.20 times as fast in float32, 1.04 in bfloat16). The plain
weights stay for training, and for saving the model.

The root-mean-square norm of Llama's family is one operation here, or two in 16 bits; written out, it is six or eight.
That is for a GPU, where operations of so little work cost their launch, and which PyTorch has a kernel for
(github.com/pytorch/pytorch/pull/153666): an 8B target has 65 norms. Not measured there. On two cores of an AMD EPYC a
norm alone takes 10.5 µs instead of 17.7, and pico's step with its 49 as long as before (15.74 and 15.83 ms).
Axes: N row, I input width, O output width, D hidden, X any axes.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.functional import rms_norm

from coral_core.errors import CoralWarning

FILL, LARGE = 4, 1 << 20
"""By AVX-512, fewer rows are filled up to FILL where a weight has LARGE elements: the kernel is faster with rows nobody
wants. By AVX2 it is slower with them (Zen 3, one row, float32, 4,864 x 896: 0.95 ms alone, 1.51 filled)."""
ALONE = 1 << 17
"""Elements of a float32 weight from which a single row gains too: pico's step took 15.3 ms with all of its weights
plain, 15.0 with those of 2^17 and more packed, 15.5 with those of 2^16, 15.75 with all."""
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


class Packed:
    """One weight, packed."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), FILL)
        self.fills = weight_OI.numel() >= LARGE and torch.backends.cpu.get_cpu_capability() == "AVX512"
        self.fewest = 1 if weight_OI.numel() >= ALONE or weight_OI.dtype == torch.bfloat16 else 2
        """Rows from which it is faster than a plain product."""
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def linear(self, x_XI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        """As nn.functional.linear: [...,O] of [...,I]."""
        if not self.fills or (rows := x_XI.numel() // x_XI.shape[-1]) >= FILL:
            return self._product(x_XI, self.weight, bias_O, "none", [], "")
        filled_NI = nn.functional.pad(x_XI.reshape(rows, -1), (0, 0, 0, FILL - rows))
        out_NO = self._product(filled_NI, self.weight, bias_O, "none", [], "")
        return out_NO[:rows].unflatten(0, x_XI.shape[:-1])


def wanted() -> bool:
    """Whether products are packed now. Gradients and autocasting are for plain layers."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class PackedLinear(nn.Linear):
    """An nn.Linear that is packed for few rows, where no gradient is wanted."""

    _packed: tuple[torch.Tensor, int, Packed | None] = (torch.empty(0), -1, None)
    """A weight, its version, and how it is packed, if it can be: one that was moved or trained since is packed anew.
    The tensor is held, so that no other weight can come to lie at its address and be taken for it."""
    _fewest = 1
    """Rows from which the packed weight serves."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows, weight_OI = input.numel() // self.in_features, self.weight
        if rows >= self._fewest and wanted() and input.dtype == weight_OI.dtype:
            source_OI, version, packed = self._packed
            if version != weight_OI._version or source_OI.data_ptr() != weight_OI.data_ptr():
                packed = Packed(weight_OI) if packs(weight_OI) else None
                self._packed = weight_OI.detach(), weight_OI._version, packed
                self._fewest = packed.fewest if packed else 1
            if packed is not None and rows >= self._fewest:
                return packed.linear(input, self.bias)
        return nn.functional.linear(input, weight_OI, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is packed, which can neither be copied nor stored."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def pack(model: nn.Module, read: Sequence[nn.Module]) -> None:
    """Let the linear layers of a model multiply few rows packed, where memory has room for a second copy of them.

    `read` are its parts that decoding calls: others, as a vision tower, are never packed.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear and packs(module.weight)]
    called = {module for part in read for module in part.modules()}
    size, free = sum(part.weight.nbytes for part in linears if part in called), psutil.virtual_memory().available
    if size > SPARE * free:
        warnings.warn(
            f"decoding is slower than it could be: {size / 2**30:.1f} GiB of weights are packed only where twice as "
            f"much memory is free, and {free / 2**30:.1f} GiB are",
            CoralWarning,
            stacklevel=2,
        )
        return
    for linear in linears:
        linear.__class__ = PackedLinear


def scaled_norm(x_XD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · x / rms(x); as in Llama, x / rms(x) is computed in float32 and rounded to x's dtype."""
    if x_XD.dtype == weight_D.dtype == torch.float32:
        return rms_norm(x_XD, weight_D.shape, weight_D, eps)
    return rms_norm(x_XD, weight_D.shape, None, eps).type_as(x_XD) * weight_D


DIFFERENT = 0.05
"""A norm is replaced only if at most this share of its bfloat16 outputs changes. Llama's: 0 of 4,096. OLMo 2's, which
rounds at another place: one in four."""


class ShortNorm(nn.Module):
    """A norm of transformers in its short form, on the same weight."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return scaled_norm(hidden_states, self.weight, self.variance_epsilon)


@torch.no_grad()
def shorten_norms(model: Any) -> None:
    """Shorten the norms that answer as Llama's does. Others, such as Gemma's, whose weight is an offset, stay; so do
    those whose weight is of another dtype than the model (gpt-oss's in float16)."""
    dtype = next(model.parameters()).dtype
    for module in model.modules():
        named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        weight_D = getattr(module, "weight", None)
        if not named or not isinstance(weight_D, nn.Parameter) or weight_D.dtype != dtype:
            continue
        x_1D = torch.linspace(-2, 2, weight_D.numel()).to(weight_D)[None]
        own_1D, short_1D = module(x_1D).bfloat16(), scaled_norm(x_1D, weight_D, module.variance_epsilon).bfloat16()
        if (own_1D != short_1D).float().mean() <= DIFFERENT:
            module.__class__ = ShortNorm
