"""Which dtype `target.dtype: auto` means. Answers in bfloat16 may differ from those in float32: the output names it."""

import functools
import time
from pathlib import Path

import torch

LARGE_BYTES = 100_000_000
"""A checkpoint below this is decoded in float32 on a processor: its weights stay in the caches, and bfloat16 gains
nothing (pico, 44 MB: a plain step takes 16.5 ms in float32 and 16.3 in bfloat16)."""
GAIN = 1.1
"""How much faster bfloat16 must be."""
SIZE, MATRICES, ROWS, TURNS = 2048, 4, (1, 8), 4
"""Products that are timed: 64 MB of weights in float32, for a plain step and for a small tree."""


def pick_dtype(dtype: str, device: torch.device, checkpoint: Path | None) -> torch.dtype:
    """`auto` is bfloat16 on a GPU, and on a processor that is faster in it, for a checkpoint that is large.

    `checkpoint` is its file or folder; None where it is on the Hub.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if _is_large(checkpoint) and bfloat16_is_faster() else torch.float32


def _is_large(checkpoint: Path | None) -> bool:
    if checkpoint is None:
        return True
    files = checkpoint.glob("*.safetensors") if checkpoint.is_dir() else [checkpoint]
    return sum(file.stat().st_size for file in files) > LARGE_BYTES * (1 if checkpoint.is_dir() else 0.3)


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
                row_RD = torch.ones(rows, SIZE, dtype=dtype)
                for matrix_DD in matrices:
                    torch.nn.functional.linear(row_RD, matrix_DD)
            spent[dtype] = min(spent[dtype], time.thread_time() - begun)
    return spent[torch.bfloat16] * GAIN < spent[torch.float32]
