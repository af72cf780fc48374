"""Whether this processor multiplies faster in bfloat16 than in float32.

Axes: N row, D hidden.
"""

import functools
import time

import torch

GAIN = 1.1
"""How much faster bfloat16 must be."""
SIZE, MATRICES, ROWS, TURNS = 2048, 4, (1, 8), 4
"""Products that are timed: 64 MB of weights in float32, for a plain step and for a small tree."""


@functools.cache
def bfloat16_is_faster() -> bool:
    """Time products of few rows in both dtypes on this processor, once per process: some 0.1 s.

    AVX-512 with bfloat16, and AMX, are faster; a processor that converts every weight first is slower.
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
    return spent[torch.bfloat16] * GAIN < spent[torch.float32]
