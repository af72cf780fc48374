"""Which dtype `target.dtype: auto` means. Answers in bfloat16 may differ from those in float32: the output names it."""

from pathlib import Path

import torch

from coral_core.kernels.precision import bfloat16_is_faster

LARGE_BYTES = 100_000_000
"""A checkpoint below this is decoded in float32 on a processor: its weights stay in the caches, and bfloat16 gains
nothing (pico, 44 MB: a plain step takes 16.5 ms in float32 and 16.3 in bfloat16)."""


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
