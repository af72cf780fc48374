"""Whether this machine multiplies faster in bfloat16 than in float32.

Axes: N row, D hidden.
"""

import functools
import time
from typing import Literal

import torch

from coral_core.errors import first_line

GAIN = 1.1
"""How much faster bfloat16 must be."""
SIZE, MATRICES, ROWS, TURNS = 2048, 4, (1, 32), 4
"""Products that are timed: 64 MB of weights in float32, for a plain step and for a tree. A processor without bfloat16
(Zen 3, two cores) takes half of float32's time for one row, as much for 8, and three times as much for 32."""
PLAIN = 4
"""Times as long in bfloat16, from which nobody needs to know more."""


def bfloat16_is_faster() -> bool:
    """Whether products in bfloat16 are clearly faster on this processor: with AVX-512's bfloat16, and with AMX."""
    return bfloat16_over_float32() * GAIN < 1


@functools.cache
def bfloat16_over_float32() -> float:
    """Time of products in bfloat16 by that in float32, on this processor, measured once per process: 0.1 to 0.6 s.

    One turn decides where it is plain: some versions of PyTorch take 500 times as long by AVX2 (pytorch issue 146508).
    """
    spent = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    weights = {dtype: [torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(MATRICES)] for dtype in spent}
    for _ in range(TURNS):
        for dtype, matrices in weights.items():
            begun = time.thread_time()
            for rows in ROWS:
                row_ND = torch.ones(rows, SIZE, dtype=dtype)
                for matrix_DD in matrices:
                    torch.nn.functional.linear(row_ND, matrix_DD)
            spent[dtype] = min(spent[dtype], time.thread_time() - begun)
        if spent[torch.bfloat16] > PLAIN * spent[torch.float32]:
            break
    return spent[torch.bfloat16] / spent[torch.float32]


def mixed_precision(device: torch.device) -> Literal["no", "bf16"]:
    """accelerate's word for `train.precision: auto`: bf16 on a GPU that has it, and on a processor faster in it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type == "cpu" and not no_gradient_in_bfloat16() and bfloat16_is_faster() else "no"


@functools.cache
def no_gradient_in_bfloat16() -> str:
    """Why this processor cannot train in bfloat16; empty where it can.

    oneDNN multiplies forwards alone on Intel's Lunar Lake and Arrow Lake (avx2_vnni_2; pytorch issue 148861).
    """
    try:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            x_ND, weight_DD = torch.ones(32, 64, requires_grad=True), torch.ones(64, 64, requires_grad=True)
            torch.nn.functional.linear(x_ND, weight_DD).float().sum().backward()
    except RuntimeError as error:
        return first_line(error)
    return ""
