"""Exactness over families of transformers: speculative = plain = `generate`, at temperature 0, 0.7 and 1, in float32.

Each family is a random model of two layers from its config class. A family that coral does not take is refused in one
line; it stands in REFUSED with what the line must say.
"""

import dataclasses
import random
from typing import Any

import pytest
import torch
import transformers

from coral_core.api.generate import Speculate
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.errors import TargetError
from coral_core.target.load import wrap
from coral_core.target.target import Target
from tests.tiny import OracleHead, tiny_drafter

pytestmark = pytest.mark.slow

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
SLIDES = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
ALONE = {"num_key_value_heads": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "AfmoeConfig": {**MOE, **SLIDES, "num_dense_layers": 1},
    "ApertusConfig": {},
    "ArceeConfig": {},
    "BitNetConfig": {},
    "CohereConfig": {"logit_scale": 0.25},
    "Cohere2Config": {**SLIDES, "logit_scale": 0.25},
    "CwmConfig": SLIDES,
    "DbrxConfig": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 160,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV2Config": {**MLA, **MOE, **GROUPED, "first_k_dense_replace": 1},
    "DeepseekV3Config": {**MLA, **MOE, **GROUPED, "first_k_dense_replace": 1},
    "DiffLlamaConfig": {},
    "DogeConfig": {"keep_window_size": 2048},
    "Dots1Config": {**MOE, **GROUPED, "first_k_dense_replace": 1},
    "Ernie4_5Config": {},
    "Ernie4_5_MoeConfig": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "Exaone4Config": SLIDES,
    "FalconConfig": {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "head_dim": None},
    "FlexOlmoConfig": MOE,
    "GPT2Config": ALONE,
    "GPTBigCodeConfig": {},
    "GPTJConfig": {"n_embd": 32, "rotary_dim": 4, "n_layer": 2, "n_head": 4, "n_positions": 160},
    "CodeGenConfig": {"n_embd": 32, "rotary_dim": 4, "n_layer": 2, "n_head": 4, "n_positions": 160},
    "GPTNeoXConfig": ALONE,
    "GPTNeoXJapaneseConfig": ALONE,
    "GemmaConfig": {},
    "Gemma2Config": {"sliding_window": 6, "final_logit_softcapping": 5.0},
    "Gemma3TextConfig": SLIDES,
    "GlmConfig": {},
    "Glm4Config": {},
    "Glm4MoeConfig": {**MOE, **GROUPED, "first_k_dense_replace": 1},
    "GptOssConfig": {**MOE, **SLIDES},
    "GraniteConfig": {"logits_scaling": 2.0},
    "GraniteMoeConfig": {**MOE, "logits_scaling": 2.0},
    "GraniteMoeSharedConfig": {**MOE, "shared_intermediate_size": 24},
    "HeliumConfig": {},
    "HunYuanDenseV1Config": {},
    "HyperCLOVAXConfig": {"logits_scaling": 2.0},
    "HunYuanMoEV1Config": {**MOE, "moe_topk": 2},
    "JetMoeConfig": {**MOE, "kv_channels": 8},
    "LlamaConfig": {},
    "MiniMaxM2Config": MOE,
    "MinistralConfig": SLIDES,
    "Ministral3Config": {},
    "MistralConfig": {"sliding_window": 7},
    "MixtralConfig": MOE,
    "NanoChatConfig": {},
    "NemotronConfig": {},
    "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "OlmoConfig": {},
    "Olmo2Config": {},
    "Olmo3Config": SLIDES,
    "OlmoeConfig": MOE,
    "PersimmonConfig": ALONE,
    "PhiConfig": {},
    "Phi3Config": {"original_max_position_embeddings": 160},
    "PhimoeConfig": MOE,
    "Qwen2Config": {},
    "Qwen2MoeConfig": {**MOE, "shared_expert_intermediate_size": 24},
    "Qwen3Config": {},
    "Qwen3MoeConfig": MOE,
    "SeedOssConfig": {},
    "SmolLM3Config": {},
    "SolarOpenConfig": {**MOE, **GROUPED},
    "StableLmConfig": {},
    "Starcoder2Config": {"sliding_window": 7},
    "VaultGemmaConfig": SLIDES,
    "YoutuConfig": MLA,
    "XGLMConfig": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BloomConfig": ({"n_layer": 2, "n_head": 4}, "position ids"),
    "BambaConfig": ({"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]}, "."),
    "FalconH1Config": ({"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64}, "."),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "Llama4TextConfig": ({"intermediate_size_mlp": 48, "num_local_experts": 2}, "chunked_attention"),
    "MambaConfig": ({}, "."),
    "ModernBertDecoderConfig": ({}, "misses its own logits"),
    "MptConfig": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "position ids"),
    "OpenAIGPTConfig": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}, "no cache"),
    "Qwen3NextConfig": (MOE, "linear_attention"),
    "RwkvConfig": ({"attention_hidden_size": 32}, "."),
}


def model_of(name: str, changes: dict[str, Any]) -> Any:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    config = kind(**{key: value for key, value in {**COMMON, **changes}.items() if value is not None})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def ids_of(rounds: Any) -> list[int]:
    return [token for event in rounds for token in event.new_ids]


def speculated(target: Target, prompt: list[int], sampler: Sampler, expected: list[int]) -> list[int]:
    """By an oracle that is right three times in four, so that long and short paths are kept, and none."""
    head = OracleHead(expected, right=0.75)
    engine = Engine(target, tiny_drafter(target), head, TreeShape(depth=4, nodes=12, topk=3))
    return ids_of([head.follow(event) for event in engine.decode(prompt, sampler, len(expected))])


@pytest.mark.parametrize("name", FAMILIES)
def test_speculative_is_plain_is_generate(name: str) -> None:
    target = dataclasses.replace(wrap(model_of(name, FAMILIES[name]), None), stop_ids=frozenset())
    for seed, length in ((0, 1), (1, 23)):
        prompt = random.Random(seed).choices(range(3, VOCAB), k=length)
        ids_BT = torch.tensor([prompt])
        for temperature in (0.0, 0.7, 1.0):
            sampler = Sampler(temperature=temperature, seed=seed)
            expected = ids_of(plain(target, prompt, sampler, 16))
            assert speculated(target, prompt, sampler, expected) == expected
            options: dict[str, Any] = {"max_new_tokens": 16, "attention_mask": torch.ones_like(ids_BT)}
            options |= {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
            torch.manual_seed(seed)
            own = target.model.generate(ids_BT, **options)
            assert temperature or own[0, length:].tolist() == expected
            head = OracleHead(own[0, length:].tolist(), right=0.75)
            engine = Engine(target, tiny_drafter(target), head, TreeShape(depth=4, nodes=12, topk=3))
            torch.manual_seed(seed)
            assert torch.equal(target.model.generate(ids_BT, custom_generate=Speculate(engine), **options), own)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drafted_for_is_refused_in_one_line(name: str) -> None:
    changes, why = REFUSED[name]
    with pytest.raises(TargetError, match=why) as error:
        wrap(model_of(name, changes), None)
    assert "\n" not in str(error.value) and "Choose another target.model" in str(error.value)
