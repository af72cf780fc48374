"""`coral env`: what a bug report should say of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Annotated, Any

import typer

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers", "numpy", "typer")
EXTRAS = {
    "serve": ("starlette", "uvicorn"),
    "gguf": ("gguf",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TORCH_DEVICE_BACKEND_AUTOLOAD")
"""Environment variables that change what coral does here. Tokens and keys are not among them."""


def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what this machine is: versions, devices, threads, cache folders; for a bug report."""
    from coral_cli.console import print_json, print_table

    found = {**_versions(), **_machine(), **_folders()}
    if as_json:
        print_json(found)
    else:
        print_table(("coral env", ""), [(name, str(value)) for name, value in found.items()])


def _versions() -> dict[str, Any]:
    from coral_core import __version__

    found = {"coral": __version__, "python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    return found | {f"extra {extra}": ", ".join(map(_version_of, names)) for extra, names in EXTRAS.items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _version_of(package: str) -> str:
    return f"{package} {_version(package)}"


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    from coral_core.decoding.measure import device_name

    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
    }
    if not torch.cuda.is_available():
        return found | {"GPU": "none that this PyTorch can use"}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"GPU {number}"] = (
            f"{torch.cuda.get_device_name(number)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    return found | {"CUDA": str(torch.version.cuda)}


def _folders() -> dict[str, Any]:
    from huggingface_hub import constants

    found = {"models and datasets are kept in": constants.HF_HUB_CACHE}
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}
