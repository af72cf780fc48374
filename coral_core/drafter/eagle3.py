"""EAGLE-3 checkpoints on disk, of EAGLE's authors, SpecForge, and the speculators package: their names and keys.

The layer is called midlayer.* or layers.0.*; lm_head.weight [C,D] has C rows of its own, which d2t [C] leads to tokens
of the target (token = row + d2t); t2d says the same from the other side and is not read. speculators nests the Llama
config, and EAGLE-3.1's norms are its keys norm_output and fc_norm.

The list of tapped layers is read as each writer counts: at the top of config.json (vLLM, speculators) the layers whose
inputs are read; within eagle_config (SpecForge, as SGLang reads it) those whose outputs are, one layer earlier.
Axes: C candidate token: a row of the drafter's own LM head, D hidden, I input width.
"""

from pathlib import Path
from typing import Any

import torch

from coral_core.errors import ArtifactError

LIST = "eagle_aux_hidden_state_layer_ids"
BY_CORAL = "made_by_coral"
"""Says in config.json that norm_output means what is fed back, as vLLM and SGLang read it."""
SIGNS = ("d2t", "t2d", "midlayer.", "layers.0.hidden_norm.")
REMEDY = "Import a whole EAGLE-3 checkpoint"


def is_it(weights: dict[str, torch.Tensor]) -> bool:
    """Whether these are an EAGLE-3 drafter's."""
    return any(name.startswith(SIGNS) for name in weights)


def flat(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """config.json's keys with speculators' nested Llama config among them. Raises ArtifactError for its other kinds."""
    kind = values.get("speculators_model_type")
    if kind is None:
        return values
    nested = values.get("transformer_layer_config")
    if kind != "eagle3" or not isinstance(nested, dict):
        raise ArtifactError(f"{path}: speculators_model_type is {kind!r}; coral reads eagle3. {REMEDY}")
    if (model := nested.get("model_type", "llama")) != "llama":
        raise ArtifactError(f"{path}: transformer_layer_config is of model_type {model!r}, not llama. {REMEDY}")
    return {**nested, **{key: value for key, value in values.items() if key != "transformer_layer_config"}}


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By coral's names. A head of its own without d2t stands for the whole vocabulary, row by row."""
    found = {name.replace("midlayer.", "layers.0.", 1): value for name, value in weights.items() if name != "t2d"}
    if "d2t" in found:
        found["d2t"] = found["d2t"].long()
    elif "lm_head.weight" in found:
        found["d2t"] = torch.zeros(len(found["lm_head.weight"]), dtype=torch.int64)
    return found


def changes(
    path: Path, values: dict[str, Any], weights: dict[str, torch.Tensor], taps: tuple[int, ...]
) -> dict[str, Any]:
    """The fields of DrafterConfig that EAGLE-3 adds. Raises ArtifactError, naming the key that coral cannot follow."""
    hidden = values["hidden_size"]
    if (read := values.get("target_hidden_size") or hidden) != hidden:
        sizes = f"target_hidden_size is {read}, hidden_size {hidden}"
        raise ArtifactError(f"{path}: {sizes}; coral needs them equal. {REMEDY}")
    if values.get("norm_before_fc"):
        raise ArtifactError(f"{path}: norm_before_fc is true; coral has a norm per layer (fc_norm), or none. {REMEDY}")
    if values.get("norm_output") and "speculators_model_type" not in values and not values.get(BY_CORAL):
        raise ArtifactError(
            f"{path}: norm_output is true, which means two things outside of speculators' and coral's folders "
            "(what is fed back, or what the LM head reads). Remove the key if the raw output is fed back"
        )
    head_CD = weights.get("lm_head.weight")
    rows = 0 if head_CD is None else len(head_CD)
    said = values.get("draft_vocab_size")
    if rows and said not in (None, rows):
        raise ArtifactError(f"{path}: draft_vocab_size is {said}; lm_head.weight has {rows} rows. {REMEDY}")
    if not rows and said not in (None, values["vocab_size"]):
        raise ArtifactError(f"{path}: draft_vocab_size is {said}, and there is no lm_head.weight. {REMEDY}")
    return {
        "taps": _taps(path, values, weights, taps),
        "draft_vocab_size": rows,
        "norm_before_residual": bool(values.get("norm_before_residual")),
        "norm_output": bool(values.get("norm_output")),
        "fc_norm": bool(values.get("fc_norm")),
    }


def _taps(
    path: Path, values: dict[str, Any], weights: dict[str, torch.Tensor], taps: tuple[int, ...]
) -> tuple[int, ...]:
    nested = values.get("eagle_config")
    earlier = nested.get(LIST) if isinstance(nested, dict) else None
    try:
        if values.get(LIST):
            taps = tuple(int(layer) for layer in values[LIST])
        elif earlier:
            taps = tuple(int(layer) + 1 for layer in earlier)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {LIST} is no list of layers. {REMEDY}") from error
    if not taps:
        raise ArtifactError(
            f"{path} has no {LIST}, and which layers are meant depends on the target. "
            "Run: coral import, with its target"
        )
    fc_DI = weights.get("fc.weight")
    if fc_DI is not None and fc_DI.shape[-1] != len(taps) * values["hidden_size"]:
        raise ArtifactError(
            f"{path}: {LIST} names {len(taps)} layers, and fc.weight reads "
            f"{fc_DI.shape[-1] / values['hidden_size']:g}. {REMEDY}"
        )
    return taps
