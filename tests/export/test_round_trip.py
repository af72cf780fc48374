"""Export to each engine and back: weights, tokens and rounds unchanged exactly; the folder as its loader wants it."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from coral_core.artifacts import Manifest
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.checkpoint import read_checkpoint
from coral_core.drafter.load import load_drafter
from coral_core.export.bring_in import bring_in
from coral_core.export.layouts import LAYOUTS
from coral_core.export.run import TOKEN_MAP, export_engine, export_hf, frequent_tokens
from coral_core.head.load import load_head
from tests.export.helpers import RECIPE, publish, random_drafter
from tests.export.reference import Reference
from tests.tiny import VOCAB, PlainHead, tiny_target

# Written from the loaders: vLLM 0.33.0 model_executor/models/llama_eagle.py (fc: ReplicatedLinear, bias=False; layer 0
# without input norm; names get the prefix "model."), SGLang 0.5.23 srt/models/llama_eagle.py (fc: nn.Linear, so with a
# bias), EAGLE's cnets1.py. Hidden 32, inner 48, 4 heads and 2 key heads of 8.
COMMON = {
    "embed_tokens.weight": (96, 32),
    "fc.weight": (32, 64),
    "layers.0.self_attn.q_proj.weight": (32, 32),
    "layers.0.self_attn.k_proj.weight": (16, 32),
    "layers.0.self_attn.v_proj.weight": (16, 32),
    "layers.0.self_attn.o_proj.weight": (32, 32),
    "layers.0.mlp.gate_proj.weight": (48, 32),
    "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48),
    "layers.0.post_attention_layernorm.weight": (32,),
}
TABLES = {"vllm": COMMON, "sglang": COMMON | {"fc.bias": (32,)}, "eagle": COMMON}
KEYS = {
    "vllm": {"architectures": ["LlamaForCausalLM"], "bias": False},
    "sglang": {"architectures": ["LlamaForCausalLMEagle"], "bias": None},
    "eagle": {"architectures": ["LlamaForCausalLM"], "bias": False, "rope_parameters": None, "rope_scaling": None},
}
SAME_KEYS = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "float32",
}


def decoded(target, drafter, temperature):
    """Every round of three answers: the ids, and how many of them were drafted."""
    engine = Engine(target, drafter, PlainHead(target), TreeShape(depth=4, nodes=9, topk=3))
    sampler = Sampler(temperature=temperature, seed=3)
    rounds = [event for start in (5, 6, 7) for event in engine.decode([1, start, 9, 4], sampler, 24)]
    return [(event.new_ids, event.accepted_drafts) for event in rounds]


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_folder_has_the_names_shapes_and_keys_of_the_engines_loader(tmp_path, to):
    target = tiny_target("llama")
    folder = export_engine(to, publish(tmp_path, target, random_drafter(target)), target, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == TABLES[to]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    values = json.loads((folder / "config.json").read_text())
    assert {key: values[key] for key in SAME_KEYS} == SAME_KEYS
    assert {key: values.get(key) for key in KEYS[to]} == KEYS[to]
    if to == "sglang":
        assert not weights["fc.bias"].any()
    assert Manifest.read(folder, "export", "").inputs["target"] == target.fingerprint


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_export_and_import_leave_tokens_and_rounds_as_they_are(tmp_path, to, temperature):
    """The grouped head apart, which only coral's own format carries."""
    target = dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())
    drafter = random_drafter(target)
    folder = export_engine(to, publish(tmp_path / "a", target, drafter), target, tmp_path / "a")
    manifest, with_head = bring_in(str(folder), tmp_path / "b", target)
    back = load_drafter(tmp_path / "b" / "drafter")
    assert not with_head
    assert manifest.inputs == {"target": target.fingerprint}
    assert dataclasses.replace(back.config, head_dim=8) == drafter.config
    assert all(torch.equal(weight, drafter.state_dict()[name]) for name, weight in back.state_dict().items())
    assert decoded(target, back, temperature) == decoded(target, drafter, temperature)


def test_corals_own_format_brings_drafter_and_head_back(tmp_path):
    target = tiny_target("llama")
    source = publish(tmp_path / "a", target, random_drafter(target), head=True)
    folder = export_hf(source, tmp_path / "a")
    manifest, with_head = bring_in(str(folder), tmp_path / "b", target)
    assert with_head
    assert manifest == source.manifest
    for name in ("drafter/model.safetensors", "drafter/config.json", "drafter/manifest.json", "head/head.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    load_head(
        tmp_path / "b" / "head",
        RECIPE.head,
        target.lent,
        target_fingerprint=target.fingerprint,
        drafter_fingerprint=manifest.fingerprint,
    )


@pytest.mark.parametrize("to", LAYOUTS)
def test_our_drafter_and_an_independent_layer_agree_on_the_exported_folder(tmp_path, to):
    target = tiny_target("llama")
    folder = export_engine(to, publish(tmp_path, target, random_drafter(target)), target, tmp_path)
    torch.manual_seed(2)
    ids, feature_TD = torch.randint(0, VOCAB, (11,)), torch.randn(11, 32)

    def causal(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    drafter, position_BT = read_checkpoint(folder).drafter, torch.arange(11)[None]
    ours_BTD = drafter(target.lent.embed(ids)[None], feature_TD[None], drafter.rope(position_BT, torch.float32), causal)
    torch.testing.assert_close(ours_BTD[0], Reference(folder)(ids.tolist(), feature_TD), rtol=0, atol=1e-5)


def test_a_bias_of_fc_stays_where_the_engine_has_one(tmp_path):
    """EAGLE's own code and SGLang have one, coral keeps it, vLLM refuses it (test_refusals)."""
    target = tiny_target("llama")
    drafter = random_drafter(target, fc_bias=True)
    for to in ("eagle", "sglang"):
        folder = export_engine(to, publish(tmp_path / to, target, drafter), target, tmp_path / to)
        values = json.loads((folder / "config.json").read_text())
        assert values.get("bias") is (True if to == "eagle" else None)  # to SGLang it would mean attention's
        bring_in(str(folder), tmp_path / to / "b", target)
        back = load_drafter(tmp_path / to / "b" / "drafter")
        assert torch.equal(back.fc.bias, drafter.fc.bias)
        assert decoded(target, back, 0.0) == decoded(target, drafter, 0.0)


def test_the_token_map_is_the_list_that_sglang_reads(tmp_path):
    target = tiny_target("llama")
    source = publish(tmp_path, target, random_drafter(target), head=True)
    by_default, chosen = (frequent_tokens(source, RECIPE, target, size) for size in (None, 10))
    assert by_default.tolist() == list(range(VOCAB * 2 // 8))  # the helper's counts fall with the id
    folder = export_engine("sglang", source, target, tmp_path, chosen)
    assert torch.load(folder / TOKEN_MAP, weights_only=True) == list(range(10))


def test_the_embedding_is_stored_as_narrow_as_it_is_exact(tmp_path):
    target = tiny_target("llama")
    rounded = target.lent.embed_VD.to(torch.bfloat16).float()
    target = dataclasses.replace(target, lent=dataclasses.replace(target.lent, embed_VD=rounded))
    folder = export_engine("vllm", publish(tmp_path, target, random_drafter(target)), target, tmp_path)
    stored = load_file(folder / "model.safetensors")["embed_tokens.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored.float(), rounded)


def test_scaled_rope_comes_back_from_the_config(tmp_path):
    """Llama-3.1's frequencies: both engines compute them from the same four numbers."""
    target = tiny_target("llama")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    drafter = random_drafter(target, rope_parameters=rope)
    for to in ("vllm", "sglang"):
        folder = export_engine(to, publish(tmp_path / to, target, drafter), target, tmp_path / to)
        assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope
        assert torch.equal(read_checkpoint(folder).drafter.rope.inv_freq_E, drafter.rope.inv_freq_E)
