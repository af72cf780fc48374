"""What each engine's loader accepts of a drafter: read in vLLM 0.33.0, SGLang 0.5.23 and EAGLE's cnets1.py.

Config keys, the RoPE variants that it computes as the drafter was trained with them, and the
targets that its classes can lend an embedding and a head from. vLLM's and SGLang's own loaders
are run on the folders by tests/export/test_engines.py.
Axes: V vocabulary, D hidden.
"""

import dataclasses
from typing import Any, Literal

import torch

from coral_core.drafter.config import DrafterConfig

_YARN = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}

NO_LENDER = "{engine} runs it by a class that has no {what} to share with a drafter"
UNREAD = "its class in {engine} is not among those whose sharing of embedding and head was checked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One engine's folder."""

    engine: str
    architecture: str
    fc_bias: Literal["never", "always", "as is"]
    """never: its `fc` has none; always: zeros must stand where there is none, or it stays random."""
    rope: dict[str, set[str]]
    """RoPE type -> its keys, besides type and theta, which the engine reads as transformers does."""
    targets: frozenset[str]
    """model_type of the targets that it can serve with this drafter."""
    refused: dict[str, str]
    """model_type -> why not."""
    serve: str
    """The command, with {target}, {folder} and {depth}, {topk}, {nodes} of the recipe's tree."""
    free_head_dim: bool = True
    """Whether heads may be of another size than hidden / heads."""
    unread: tuple[str, ...] = ()
    """Keys of EAGLE-3's shape that the engine does not follow."""
    scales_logits: bool = False
    """Whether the drafter's class applies a factor on the logits."""

    def why_not(self, model_type: str) -> str:
        """Why a target of this type cannot be served, or ''."""
        if model_type in self.targets:
            return ""
        return self.refused.get(model_type, UNREAD.format(engine=self.engine))


def _lacks(engine: str, what: str, *types: str) -> dict[str, str]:
    return {name: NO_LENDER.format(engine=engine, what=what) for name in types}


_SPECULATIVE = (
    '{{"method": "eagle", "model": "{folder}", "num_speculative_tokens": {depth}, "draft_tensor_parallel_size": 1}}'
)

_LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "exaone4", "gpt_oss", "gemma3_text"}
"""Types whose classes in both engines have `embed_tokens` (or `embedding`) and `lm_head`, and lend both."""
_NO_GETTER = ("mixtral", "gemma", "gemma2", "phi", "gpt2", "stablelm", "olmo", "olmo2", "cohere", "cohere2", "granite")

LAYOUTS = {
    "vllm": Layout(
        engine="vLLM",
        architecture="LlamaForCausalLM",  # vLLM puts Eagle before it
        fc_bias="never",
        rope={"default": set(), "linear": {"factor"}, "llama3": _LLAMA3, "yarn": _YARN | {"attention_factor"}},
        targets=frozenset(_LLAMA_LIKE | {"mixtral", "gemma", "stablelm", "granite"}),
        refused={
            **_lacks("vLLM", "lm_head", "gemma2", "cohere", "cohere2"),
            **_lacks("vLLM", "embed_tokens", "gpt2", "opt"),
        },
        serve=f"vllm serve {{target}} --speculative-config '{_SPECULATIVE}'",
        scales_logits=True,
    ),
    "sglang": Layout(
        engine="SGLang",
        architecture="LlamaForCausalLMEagle",
        fc_bias="always",
        rope={"default": set(), "linear": {"factor"}, "llama3": _LLAMA3, "yarn": _YARN},
        targets=frozenset(_LLAMA_LIKE),
        refused=_lacks("SGLang", "get_embed_and_head", *_NO_GETTER),
        serve=(
            "python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE "
            "--speculative-draft-model-path {folder} --speculative-num-steps {depth} --speculative-eagle-topk {topk} "
            "--speculative-num-draft-tokens {nodes}"
        ),
    ),
    "eagle": Layout(
        engine="EAGLE's code",
        architecture="LlamaForCausalLM",
        fc_bias="as is",
        rope={"default": set()},
        targets=frozenset({"llama", "qwen2", "mixtral"}),
        refused={},
        serve=(
            "EaModel.from_pretrained(use_eagle3=False, base_model_path='{target}', ea_model_path='{folder}', "
            "depth={depth}, top_k={topk}, total_token={nodes})"
        ),
        free_head_dim=False,
    ),
}


def narrow(embed_VD: torch.Tensor) -> torch.Tensor:
    """The embedding on the CPU in the narrowest dtype that holds it exactly; float32 is mostly how it was read."""
    embed_VD = embed_VD.detach().cpu().contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(embed_VD.to(dtype).to(embed_VD.dtype), embed_VD):
            return embed_VD.to(dtype)
    return embed_VD


def llama_values(config: DrafterConfig, dtype: str, *, rope_parameters: bool = True) -> dict[str, Any]:
    """The keys that a Llama config has too.

    `tie_word_embeddings` is false even where the target's are tied: SGLang replaces both matrices one after the other.
    """
    required = (field.name for field in dataclasses.fields(config) if field.default is dataclasses.MISSING)
    rope = {key: value for key, value in config.rope_parameters.items() if key != "type"}
    values = {
        **{name: getattr(config, name) for name in required if name != "rope_parameters"},
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": rope["rope_theta"],
        "torch_dtype": dtype,
    }
    if rope_parameters:
        values["rope_parameters"] = {key: float(v) if key == "factor" else v for key, v in rope.items()}
    return values


def config_values(layout: Layout, config: DrafterConfig, *, dtype: str, logit_scale: float) -> dict[str, Any]:
    """config.json of the folder.

    `bias` is EAGLE's word for a bias of `fc`, and the engines' for one of attention: true only for EAGLE's own code.
    """
    eagle = LAYOUTS["eagle"]
    values = llama_values(config, dtype, rope_parameters=layout is not eagle)  # its config class is older than this key
    values["architectures"] = [layout.architecture]
    if layout.architecture == eagle.architecture:
        values["bias"] = layout.fc_bias == "as is" and config.fc_bias
    if layout.scales_logits and logit_scale != 1.0:
        values["logit_scale"] = logit_scale
    return values
