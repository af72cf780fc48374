"""Drafters in EAGLE's layout on disk: EAGLE-1, EAGLE-2, HASS, EAGLE-3, and the folders that coral exports for engines.

config.json is a plain Llama config; the weights, in model.safetensors, pytorch_model.bin, or several of either with an
index, have no prefix:
embed_tokens (the target's own, may be absent), fc.weight with the embedding's half first, fc.bias in some, layers.0.*.
EAGLE-3's are in eagle3.py.
Axes: V vocabulary, D hidden.
"""

import dataclasses
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from coral_core.artifacts import fingerprint
from coral_core.drafter import eagle3
from coral_core.drafter.config import DrafterConfig, read_values
from coral_core.drafter.load import build_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, first_line

EMBED = "embed_tokens.weight"
FC_BIAS = "fc.bias"
REMEDY = "Import a whole checkpoint of EAGLE-1, EAGLE-2, EAGLE-3 or HASS"
FILES = ("model.safetensors", "pytorch_model.bin")
"""A file of this name, or an index of that name and .index.json, in this order."""
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
    return read_values(folder, REMEDY).get("model_type") == "coral-drafter"


def read_checkpoint(folder: Path, taps: tuple[int, ...] = ()) -> Checkpoint:
    """Read config and weights, all of them, with no code run.

    A bias of zeros in `fc`, which SGLang's folder needs, is left out: coral's layout has none. `taps` are what an
    EAGLE-3 drafter reads of the target where its config does not say. Raises ArtifactError, naming file and tensor, for
    what is missing, unknown, damaged or of another shape, and for another kind of drafter.
    """
    values = eagle3.flat(folder / "config.json", read_values(folder, REMEDY))
    path, weights = _read_all(folder)
    if (layers := values.get("num_hidden_layers", 1)) != 1:
        raise ArtifactError(f"{path}: num_hidden_layers is {layers}; a drafter has one. {REMEDY}")
    embed_VD = weights.pop(EMBED, None)
    if eagle3.is_it(weights):
        weights = eagle3.renamed(weights)
        config = dataclasses.replace(
            _config(folder, values, fc_bias=False), **eagle3.changes(folder / "config.json", values, weights, taps)
        )
        config.refuse_nonsense(folder, REMEDY)
        return Checkpoint(build_drafter(config, weights, source=str(path), remedy=REMEDY), embed_VD, path)
    if values.get("bias") is True and FC_BIAS not in weights:
        raise ArtifactError(f"{path} lacks tensor '{FC_BIAS}', which its config.json promises. {REMEDY}")
    if FC_BIAS in weights and not weights[FC_BIAS].count_nonzero():
        del weights[FC_BIAS]
    config = _config(folder, values, fc_bias=FC_BIAS in weights)
    if embed_VD is not None and embed_VD.shape != (config.vocab_size, config.hidden_size):
        shapes = f"{tuple(embed_VD.shape)}, not {(config.vocab_size, config.hidden_size)}"
        raise ArtifactError(f"{path}: tensor '{EMBED}' has shape {shapes}. {REMEDY}")
    return Checkpoint(build_drafter(config, weights, source=str(path), remedy=REMEDY), embed_VD, path)


def weights_fingerprint(drafter: Drafter) -> str:
    """Names the weights: of every tensor its name, shape and bytes."""
    digest: dict[str, Any] = {}
    for name, weight in sorted(drafter.state_dict().items()):
        raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest[name] = [list(weight.shape), hashlib.sha256(raw).hexdigest()]
    return fingerprint(digest)


def _config(folder: Path, values: dict[str, Any], *, fc_bias: bool) -> DrafterConfig:
    """The Llama config's shape; transformers' own defaults stand for keys that old configs leave out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    path = folder / "config.json"
    if missing := [key for key in SHAPE_KEYS if key not in values]:
        raise ArtifactError(f"{path} is not a drafter's config: key '{missing[0]}' is missing. {REMEDY}")
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise ArtifactError(f"{path}: hidden_act is {act!r}; coral's drafter has silu. {REMEDY}")
    own = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
    try:
        llama = LlamaConfig(**own)
        config = DrafterConfig(
            **{key: values[key] for key in SHAPE_KEYS},
            num_key_value_heads=llama.num_key_value_heads,
            head_dim=llama.head_dim,
            rms_norm_eps=llama.rms_norm_eps,
            max_position_embeddings=llama.max_position_embeddings,
            rope_parameters=dict(llama.rope_parameters),
            fc_bias=fc_bias,
        )
    except (TypeError, ValueError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
        raise ArtifactError(f"{path} is no Llama config: {first_line(cause or error)}. {REMEDY}") from error
    config.refuse_nonsense(folder, REMEDY)
    return config


def _read_all(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(The file that was read, or the index of several; every tensor.)"""
    for name in FILES:
        path, index = folder / name, folder / f"{name}.index.json"
        if path.exists():
            return path, _read(path)
        if index.exists():
            return index, _read_shards(index)
    raise ArtifactError(f"no weights in {folder}: neither {' nor '.join(FILES)} is there. {REMEDY}")


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors that an index names, each from the file that it says, and nothing else in those files."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: _read(index.parent / Path(name).name) for name in sorted(set(places.values()))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index} is no index of weights: {first_line(error)}. {REMEDY}") from error
    weights = {}
    for shard in shards.values():
        weights.update(shard)
    if strangers := sorted(weights.keys() ^ places.keys()):
        raise ArtifactError(f"{index} and its files do not agree on tensor '{strangers[0]}'. {REMEDY}")
    return weights


def _read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. A .bin is read as data only: torch refuses a pickle that would run code."""
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is refused: it is no plain table of tensors, and reading it could run code "
            f"({_what_was_found(error)}). Import a safetensors file"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {first_line(error).split('. ')[0]}. {REMEDY}") from error
    except (EOFError, LookupError, TypeError, AttributeError) as error:  # torch's unpickler, of what is no pickle
        raise ArtifactError(f"cannot read {path}: it is no file of weights. {REMEDY}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise ArtifactError(f"{path} is not a table of named tensors. {REMEDY}")
    return weights


def _what_was_found(error: Exception) -> str:
    """torch's message is a page, with advice to allow what it found; the name of that, if there is one, is enough."""
    called = re.search(r"GLOBAL ([\w.]+)", str(error))
    unsupported = re.search(r"Unsupported \w+ \w+", str(error))
    return f"it calls {called[1]}" if called else unsupported[0] if unsupported else first_line(error)[:160]
