"""Drafters on disk and on the Hub: written, read whole or refused.

EAGLE's own checkpoints are checkpoint.py's.
Axes: C candidate: a row of the drafter's own LM head.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coral_core.artifacts import MANIFEST, Manifest, check_files, remedy
from coral_core.drafter.config import COMMAND, DrafterConfig
from coral_core.drafter.hub import fetch, upload
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.tensors import write_tensors

WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS)
"""What a drafter is on disk, besides its manifest."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights that can be computed with as they are; quantized ones mean something else by their numbers."""


def save_drafter(drafter: Drafter, folder: Path) -> None:
    """Write config.json and model.safetensors; the embedding is the target's and is not repeated."""
    drafter.config.save(folder)
    weights = {name: value.detach().cpu().contiguous() for name, value in drafter.state_dict().items()}
    write_tensors(weights, folder / WEIGHTS, {"format": "pt"})


def load_drafter(folder: Path, command: str = COMMAND) -> Drafter:
    """Read what `save_drafter` wrote, on the CPU and in the dtype on disk.

    Raises ArtifactError, naming the `command` that makes it anew, when a file is missing or damaged, or a tensor is
    absent, unknown or of another shape: never a partly random drafter.
    """
    path, mend = folder / WEIGHTS, remedy(folder, command)
    check_files(folder, FILES, command)
    config = DrafterConfig.load(folder, mend)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the drafter {path}: {error}. {mend}") from error
    return build_drafter(config, weights, source=str(path), remedy=mend)


def build_drafter(config: DrafterConfig, weights: Mapping[str, torch.Tensor], *, source: str, remedy: str) -> Drafter:
    """A frozen drafter of exactly these weights, in their own dtype.

    Raises ArtifactError, naming `source`, the first tensor that does not fit, and the `remedy`.
    """
    drafter = Drafter(config)
    expected = drafter.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ArtifactError(f"{source} lacks tensor '{name}'. {remedy}")
        if name not in expected:
            raise ArtifactError(f"{source} holds an unknown tensor '{name}'. {remedy}")
        if weights[name].shape != expected[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            raise ArtifactError(f"{source}: tensor '{name}' has shape {shapes}. {remedy}")
        if (dtype := weights[name].dtype) not in DTYPES and name != "d2t":
            raise ArtifactError(f"{source}: tensor '{name}' is {dtype}; a drafter has no such weights. {remedy}")
    drafter.load_state_dict(weights, assign=True)
    if config.draft_vocab_size:
        _refuse_wrong_tokens(drafter, source, remedy)
    return drafter.requires_grad_(False).eval()


def _refuse_wrong_tokens(drafter: Drafter, source: str, remedy: str) -> None:
    """Raises ArtifactError when the rows of its own LM head do not stand for different tokens of the target."""
    if drafter.d2t.dtype != torch.int64:
        raise ArtifactError(f"{source}: tensor 'd2t' is {drafter.d2t.dtype}; it must hold int64 offsets. {remedy}")
    token_C, vocabulary = drafter.draft_tokens, drafter.config.vocab_size
    if len(token_C) < vocabulary and not drafter.d2t.any():
        raise ArtifactError(f"{source}: tensor 'd2t' is all zero: nothing says which tokens it drafts. {remedy}")
    if token_C.min() < 0 or token_C.max() >= vocabulary:
        wrong = int(token_C[(token_C < 0) | (token_C >= vocabulary)][0])
        raise ArtifactError(f"{source}: tensor 'd2t' leads to token {wrong}, and there are {vocabulary}. {remedy}")
    if len(token_C.unique()) < len(token_C):
        raise ArtifactError(f"{source}: tensor 'd2t' leads to the same token twice. {remedy}")


def load_pretrained(name: str, revision: str | None = None) -> Drafter:
    """As `Drafter.from_pretrained`."""
    from coral_core.drafter.checkpoint import is_coral, read_checkpoint

    folder = fetch(name, revision)
    if not is_coral(folder):
        return read_checkpoint(folder).drafter
    drafter = load_drafter(folder)
    drafter.folder = folder
    if (folder / MANIFEST).exists():
        drafter.manifest = Manifest.read(folder, "drafter", COMMAND)
    return drafter


def save_pretrained(drafter: Drafter, folder: Path) -> None:
    """As `Drafter.save_pretrained`, without the push."""
    folder.mkdir(parents=True, exist_ok=True)
    save_drafter(drafter, folder)
    if drafter.manifest is not None:
        drafter.manifest.sealed(folder, *FILES).write(folder)


def push_to_hub(drafter: Drafter, repo_id: str, **options: Any) -> str:
    """As `Drafter.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(drafter, Path(folder))
        return upload(Path(folder), repo_id, **options)
