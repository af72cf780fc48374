"""Drafters in EAGLE's layout on disk: EAGLE-1, EAGLE-2, HASS, and the folders that coral exports for engines.

config.json is a plain Llama config; the weights, in model.safetensors or pytorch_model.bin, have no prefix:
embed_tokens (the target's own, may be absent), fc.weight with the embedding's half first, fc.bias in some, layers.0.*.
Axes: V vocabulary, D hidden.
"""

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coral_core.artifacts import fingerprint
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError

EMBED = "embed_tokens.weight"
FC_BIAS = "fc.bias"
REMEDY = "Import a whole EAGLE-1, EAGLE-2 or HASS checkpoint"
FILES = ("model.safetensors", "pytorch_model.bin")
SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder in EAGLE's layout holds."""

    drafter: Drafter
    embed_VD: torch.Tensor | None
    """The embedding that it was trained with, when it is there: it tells the target."""
    path: Path
    """The file of the weights."""


def is_coral(folder: Path) -> bool:
    """Whether a folder is a drafter as coral saves it, not in EAGLE's layout."""
    return _config_values(folder).get("model_type") == "coral-drafter"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config and weights, all of them, with no code run.

    A bias of zeros in `fc`, which SGLang's folder needs, is left out: coral's layout has none. Raises ArtifactError,
    naming file and tensor, for what is missing, unknown or of another shape, and for another kind of drafter.
    """
    values = _config_values(folder)
    path = _weights_file(folder)
    weights = _read(path)
    _refuse_other_kinds(path, values, weights)
    embed_VD = weights.pop(EMBED, None)
    if values.get("bias") is True and FC_BIAS not in weights:
        raise ArtifactError(f"{path} lacks tensor '{FC_BIAS}', which its config.json promises. {REMEDY}")
    if FC_BIAS in weights and not weights[FC_BIAS].count_nonzero():
        del weights[FC_BIAS]
    config = _config(folder / "config.json", values, fc_bias=FC_BIAS in weights)
    if embed_VD is not None and embed_VD.shape != (config.vocab_size, config.hidden_size):
        shapes = f"{tuple(embed_VD.shape)}, not {(config.vocab_size, config.hidden_size)}"
        raise ArtifactError(f"{path}: tensor '{EMBED}' has shape {shapes}. {REMEDY}")
    return Checkpoint(Drafter.build(config, weights, source=str(path), remedy=REMEDY), embed_VD, path)


def weights_fingerprint(drafter: Drafter) -> str:
    """Names the weights: of every tensor its name, shape and bytes."""
    digest: dict[str, Any] = {}
    for name, weight in sorted(drafter.state_dict().items()):
        raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest[name] = [list(weight.shape), hashlib.sha256(raw).hexdigest()]
    return fingerprint(digest)


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no drafter in {folder}: it has no config.json. {REMEDY}") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable as JSON: {error}. {REMEDY}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} is not a config: it is no JSON object. {REMEDY}")
    return values


def _config(path: Path, values: dict[str, Any], *, fc_bias: bool) -> DrafterConfig:
    """The Llama config's shape; transformers' own defaults stand for keys that old configs leave out."""
    from transformers import LlamaConfig

    if missing := [key for key in SHAPE_KEYS if key not in values]:
        raise ArtifactError(f"{path} is not a drafter's config: key '{missing[0]}' is missing. {REMEDY}")
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise ArtifactError(f"{path}: hidden_act is {act!r}; coral's drafter has silu. {REMEDY}")
    own = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    try:
        llama = LlamaConfig(**own)
    except (TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is no Llama config: {str(error).splitlines()[0]}. {REMEDY}") from error
    return DrafterConfig(
        **{key: int(values[key]) for key in SHAPE_KEYS},
        num_key_value_heads=int(llama.num_key_value_heads),
        head_dim=int(llama.head_dim),
        rms_norm_eps=float(llama.rms_norm_eps),
        max_position_embeddings=int(llama.max_position_embeddings),
        rope_parameters=dict(llama.rope_parameters),
        fc_bias=fc_bias,
    )


def _weights_file(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    raise ArtifactError(f"no weights in {folder}: neither {' nor '.join(FILES)} is there. {REMEDY}")


def _read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. A .bin is read as data only: torch refuses a pickle that would run code."""
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is refused: it is no plain table of tensors, and reading it could run code "
            f"({_first_reason(error)}). Import a safetensors file"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {str(error).splitlines()[0]}. {REMEDY}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ArtifactError(f"{path} is not a table of named tensors. {REMEDY}")
    return weights


def _first_reason(error: Exception) -> str:
    """torch's message is a page; what it found is in the line with 'Unsupported' or 'GLOBAL'."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])[:160]


def _refuse_other_kinds(path: Path, values: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    if any(name in weights for name in ("d2t", "t2d")) or any(name.startswith("midlayer.") for name in weights):
        raise ArtifactError(f"{path} is an EAGLE-3 drafter, which reads three layers of the target. {REMEDY}")
    if (layers := values.get("num_hidden_layers", 1)) != 1:
        raise ArtifactError(f"{path}: num_hidden_layers is {layers}; a drafter has one. {REMEDY}")
