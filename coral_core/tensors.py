"""Tensors in a file."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as readable as any other; the library lets only its owner read it."""
    save_file(dict(tensors), path, metadata=metadata)
    mask = os.umask(0o077)  # the process's mask can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)
