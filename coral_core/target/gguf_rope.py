"""What a GGUF file says of its rotary embedding and attention beyond what transformers reads of it.

transformers 5.24 reads the base of the rotary embedding, but for StarCoder2 and StableLM, and not its scaling:
these, Llama 3.1 and later, Gemma 3, and models stretched by YaRN would load with other angles, without a word.
Axes: E head dimension: one of the two halves, which turn together.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from coral_core.errors import TargetError

INSTEAD = "Set target.model to the model's own folder or Hub id"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1, 3.2 and 3.3; llama.cpp's converter makes `rope_freqs.weight` of these and a factor of 8 or 32."""
FACTORS = "rope_freqs.weight"
YARN = {"original_context_length": "original_max_position_embeddings", "yarn_beta_fast": "beta_fast"}
YARN |= {"yarn_beta_slow": "beta_slow"}
"""Keys of a GGUF and what transformers calls them."""
NARROW = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and layers of the 27B models, whose scores are divided by the root of hidden / heads, not of the head's
width (llama.cpp, `f_attention_scale`)."""
READ_BY_TRANSFORMERS = ("gpt-oss", "gemma4")
"""Architectures whose scaling transformers reads, or knows: Gemma 4's factors name the dimensions that do not turn."""


def scaling(file: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters beside the base, in transformers' words; {} where the embedding is not scaled.

    `fields` are the file's metadata, `tensors` its tensors by name. Raises TargetError for a scaling that is not known.
    """
    name = fields["general.architecture"]
    if name in READ_BY_TRANSFORMERS:
        return {}
    if FACTORS in tensors:
        return _llama3(file, name, fields, np.asarray(tensors[FACTORS].data, np.float64))
    prefix = f"{name}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    kind = said.pop("type", "linear")
    factor = float(said.pop("factor", 0) or fields.get(f"{name}.rope.scale_linear", 0))
    said.pop("finetuned", None)
    if kind == "longrope" or any(tensor.startswith("rope_factors_") for tensor in tensors):
        raise _unknown(file, "longrope")
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and set(said) <= set(YARN):
        said.setdefault("original_context_length", fields[f"{name}.context_length"])
        return {"rope_type": "yarn", "factor": factor} | {YARN[key]: value for key, value in said.items()}
    raise _unknown(file, " ".join([kind, *said]))


def _llama3(file: Path, name: str, fields: dict[str, Any], factor_E: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, where the file's factors are that one's. Raises TargetError where they are others."""
    if (factor_E == 1).all():
        return {}
    base = float(fields.get(f"{name}.rope.freq_base", 10000.0))
    wavelength_E = 2 * math.pi * base ** (np.arange(len(factor_E)) / len(factor_E))
    turns_E = LLAMA3["original_max_position_embeddings"] / wavelength_E
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth_E = ((turns_E - low) / (high - low)).clip(0, 1)
    for factor in (float(factor_E.max()), 8.0, 32.0):  # in a small model no dimension is slow enough for all of it
        if np.allclose(factor_E, 1 / ((1 - smooth_E) / factor + smooth_E), rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    raise _unknown(file, f"a tensor {FACTORS} that is not Llama 3's")


def apply(config: Any, fields: dict[str, Any], scaled: dict[str, Any]) -> None:
    """Write base and scaling into a model's config; of its attention the scale and the window that transformers lacks.

    `fields` are the file's metadata, `scaled` what `scaling` gives.
    """
    config, name = config.get_text_config(), fields["general.architecture"]
    if (name, config.num_hidden_layers) in NARROW:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    if name == "phi3":
        config.sliding_window = fields.get("phi3.attention.sliding_window") or None
    rope = getattr(config, "rope_parameters", None) or {}  # GPT-2 has none
    by_layer = "full_attention" in rope  # Gemma 3's sliding layers are not scaled
    own = rope["full_attention"] if by_layer else rope
    if base := fields.get(f"{name}.rope.freq_base"):
        own["rope_theta"] = float(base)
    if scaled and own.get("rope_type", "default") == "default":
        own |= scaled


def _unknown(file: Path, what: str) -> TargetError:
    return TargetError(f"{file} scales its rotary embedding in a way that is not read from a GGUF ({what}). {INSTEAD}")
