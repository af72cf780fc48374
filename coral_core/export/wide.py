"""EAGLE-3's shape as each engine's loader reads it: vLLM 0.33.0, SGLang 0.5.23, EAGLE's cnets.py, speculators 0.9.0.

One engine's list of tapped layers counts the layers whose inputs are read (top of config.json); SGLang's, within
eagle_config, those whose outputs are, one layer earlier. SGLang lends the target's LM head where draft_vocab_size is
null; the others get its rows written out. Axes: C candidate token: a row of the drafter's own LM head, V vocabulary, D
hidden.
"""

import dataclasses
from typing import Any

import torch

from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.eagle3 import BY_CORAL, LIST
from coral_core.drafter.load import build_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.export.layouts import LAYOUTS, Layout, llama_values, narrow
from coral_core.lent import Lent

_TARGETS = frozenset({"llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"})
"""Types whose classes in both engines hand out the inputs of their layers."""
_VLLM, _SGLANG, _EAGLE = (LAYOUTS[name] for name in ("vllm", "sglang", "eagle"))

WIDE = {
    "vllm": dataclasses.replace(
        _VLLM,
        architecture="LlamaForCausalLMEagle3",
        targets=_TARGETS,
        refused={},
        serve=_VLLM.serve.replace('"eagle"', '"eagle3"'),
    ),
    "sglang": dataclasses.replace(
        _SGLANG,
        architecture="LlamaForCausalLMEagle3",
        fc_bias="never",
        targets=_TARGETS,
        refused={},
        unread=("norm_before_residual",),
        serve=_SGLANG.serve.replace("algorithm EAGLE ", "algorithm EAGLE3 "),
    ),
    "eagle": dataclasses.replace(
        _EAGLE,
        architecture="LlamaForCausalLMEagle3",
        fc_bias="never",
        unread=("norm_before_residual", "norm_output", "fc_norm"),
        serve=_EAGLE.serve.replace("use_eagle3=False", "use_eagle3=True"),
    ),
    "speculators": Layout(
        engine="speculators",
        architecture="Eagle3DraftModel",
        fc_bias="never",
        rope=_VLLM.rope,
        targets=_TARGETS,
        refused={},
        serve="vllm serve {folder}",
    ),
}
"""Format -> its folder for EAGLE-3's shape."""


def layout_of(to: str, config: DrafterConfig) -> Layout:
    """The engine's folder for this drafter. Raises ArtifactError when the engine reads EAGLE-3's shape only."""
    if config.taps:
        return WIDE[to]
    if to not in LAYOUTS:
        raise ArtifactError(
            f"{WIDE[to].engine} reads EAGLE-3's shape only, and this drafter has EAGLE-2's. "
            "Train one with: coral train train.preset=coral3"
        )
    return LAYOUTS[to]


def with_rows(drafter: Drafter, lent: Lent, token_C: torch.Tensor) -> Drafter:
    """The drafter with an LM head of its own: the target's rows of these tokens, in their dtype's exact values."""
    token_C = token_C.sort().values.to(lent.head_VD.device)
    config = dataclasses.replace(drafter.config, draft_vocab_size=len(token_C))
    head_CD = lent.head_VD[token_C].cpu().to(drafter.fc.weight.dtype)
    weights = drafter.state_dict() | {"lm_head.weight": head_CD, "d2t": token_C.cpu() - torch.arange(len(token_C))}
    return build_drafter(config, weights, source="the drafter", remedy="Choose other tokens")


def layer_name(layout: Layout, name: str) -> str:
    """The engine's name of a tensor of ours."""
    return name if layout is WIDE["speculators"] else name.replace("layers.0.", "midlayer.", 1)


def wide_tensors(layout: Layout, drafter: Drafter, lent: Lent) -> dict[str, torch.Tensor]:
    """Every tensor of the folder but the embedding."""
    weights = {layer_name(layout, name): value for name, value in drafter.state_dict().items()}
    if drafter.config.draft_vocab_size:
        drafted_V = torch.zeros(drafter.config.vocab_size, dtype=torch.bool)
        weights["t2d"] = drafted_V.index_fill(0, drafter.draft_tokens.cpu(), True)
    elif layout is not WIDE["sglang"]:
        weights["lm_head.weight"] = narrow(lent.head_VD).clone()  # a tied one is the embedding's storage
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def wide_values(
    layout: Layout, config: DrafterConfig, *, dtype: str, logit_scale: float, target: str
) -> dict[str, Any]:
    """config.json of the folder. Every key is written, since a guess of an engine's can be wrong in silence."""
    eagle = layout is WIDE["eagle"]
    llama = llama_values(config, dtype, rope_parameters=not eagle)  # its config class is older than this key
    rows = config.draft_vocab_size or (None if layout is WIDE["sglang"] else config.vocab_size)
    values: dict[str, Any] = {
        "architectures": [layout.architecture],
        "draft_vocab_size": rows,
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "fc_norm": config.fc_norm,
    }
    if layout.scales_logits and logit_scale != 1.0:
        values["logit_scale"] = logit_scale
    if layout is WIDE["speculators"]:
        return values | _speculators(config, llama, target)
    values[BY_CORAL] = True
    if layout is WIDE["sglang"]:
        layers = [layer - 1 for layer in config.taps]
        return {**llama, **values, "eagle_config": {LIST: layers, "use_aux_hidden_state": True}}
    return {**llama, **values, LIST: list(config.taps), "num_aux_hidden_states": len(config.taps)}


def _speculators(config: DrafterConfig, llama: dict[str, Any], target: str) -> dict[str, Any]:
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": []},
        },
        "norm_before_fc": False,
        "embed_requires_grad": False,
        LIST: list(config.taps),
        "transformer_layer_config": llama,
        "torch_dtype": llama["torch_dtype"],
    }
