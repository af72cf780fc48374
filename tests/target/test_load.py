"""Which targets are taken, which are refused and how, and what is known of them."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from coral_core.decoding.engine import plain
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.errors import CoralWarning, TargetError
from coral_core.recipe.schema import TargetSpec
from coral_core.target.capture import tap
from coral_core.target.load import drafter_shape, load_target, pick_device, tap_layers, wrap
from coral_core.target.target import Target
from tests.tiny import FAMILIES, SHAPE, tiny_target


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lent_head_on_the_features_is_the_targets_own_answer(family: str) -> None:
    target = tiny_target(family)
    ids_BT = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    own_BTV = target.model(input_ids=ids_BT).logits
    torch.testing.assert_close(target.lent.logits(target.forward(ids_BT)), own_BTV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3-mixed", "gpt-neox"])
def test_features_of_a_padded_batch_equal_one_by_one(family: str) -> None:
    target = tiny_target(family)
    dialogues = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30]]
    ids_BT = torch.zeros(3, 9, dtype=torch.long)
    valid_BT = torch.zeros(3, 9, dtype=torch.bool)
    for row, ids in enumerate(dialogues):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        valid_BT[row, : len(ids)] = True
    feature_BTD = tap(target, ids_BT, valid_BT).feature_BTD
    for row, ids in enumerate(dialogues):
        alone_TD = target.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(feature_BTD[row, : len(ids)], alone_TD, rtol=0, atol=1e-5)


def test_a_recurrent_state_is_refused_by_name() -> None:
    config = transformers.Qwen3NextConfig(
        **{**SHAPE, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1},
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(TargetError, match="Qwen3NextForCausalLM has layers of type 'linear_attention'"):
        wrap(model, None)
    mamba = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(TargetError, match="MambaForCausalLM has layers of type"):
        wrap(transformers.AutoModelForCausalLM.from_config(mamba), None)


def test_logits_that_are_not_head_times_feature_are_refused() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    own = model.forward

    def twisted(*args: object, **kwargs: object) -> object:
        out = own(*args, **kwargs)
        out.logits = out.logits.flip(-1) + 1
        return out

    model.forward = twisted
    with pytest.raises(TargetError, match=r"misses its own logits by .* Choose another target\.model"):
        wrap(model, None)


def test_a_target_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"there is no folder '.*nowhere'. Set target\.model"):
        load_target(TargetSpec(model=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(TargetError, match="cannot load target"):
        load_target(TargetSpec(model=str(tmp_path)))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(
        TargetError, match=r"target.device is 'cuda:7', which this machine lacks .*\. Set target.device=auto$"
    ):
        pick_device("cuda:7")
    for name in ("gpu", "cuda:x", "", "cpu:-1"):
        with pytest.raises(TargetError, match=f"target.device is '{name}'; it must be auto, cpu, cuda or cuda:NUMBER$"):
            pick_device(name)


def test_pico_is_embedded_and_known() -> None:
    target = load_target(TargetSpec())
    shape = drafter_shape(target.model.config)
    assert target.lent.embed_VD.shape == (shape["vocab_size"], shape["hidden_size"])
    assert target.lent.head_VD is target.lent.embed_VD
    assert target.stop_ids == {target.tokenizer.convert_tokens_to_ids("<|end|>")}
    assert target.dtype == torch.float32


def test_the_fingerprint_tells_a_fine_tuned_copy_and_not_a_dtype() -> None:
    target = tiny_target("llama")
    again = wrap(transformers.AutoModelForCausalLM.from_config(target.model.config), None)
    again.model.load_state_dict(target.model.state_dict())
    assert wrap(again.model, None).fingerprint == target.fingerprint
    assert wrap(again.model.to(torch.bfloat16), None).fingerprint == target.fingerprint
    with torch.no_grad():
        again.model.model.layers[1].mlp.down_proj.weight[0, 3] += 0.5
    assert wrap(again.model, None).fingerprint != target.fingerprint


def test_every_end_token_ends_an_answer() -> None:
    """Llama 3 has three, and its chat ends with the last of them."""
    target = dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())
    model, prompt = target.model, [5, 6, 7]
    said = ids_of(target, prompt)
    last = next(token for place, token in enumerate(said) if place >= 3 and token not in said[:place])
    absent = [token for token in range(3, 96) if token not in said][:2]
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [*absent, last]
    try:
        stopping = wrap(model, None)
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3).long(), max_new_tokens=30)
    finally:
        model.generation_config.eos_token_id = own
    assert stopping.stop_ids == {*absent, last}
    assert ids_of(stopping, prompt) == expected[0, 3:].tolist() == said[: said.index(last) + 1]


def ids_of(target: Target, prompt: list[int]) -> list[int]:
    return [token for event in plain(target, prompt, Sampler(), 30) for token in event.new_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_with_a_cache_gives_no_warning(family: str) -> None:
    """transformers renames arguments model by model, and would tell every user of coral so."""
    target = tiny_target(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.forward(torch.tensor([[3, 4, 5]]), cache=transformers.DynamicCache())


def test_a_drafter_has_the_shape_of_most_layers_where_they_differ() -> None:
    """Gemma 4's full layers have larger heads; transformers refuses to say one size for all."""
    sizes = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    mixed = transformers.Gemma4TextConfig(**{**SHAPE, **sizes, "global_head_dim": 16, "head_dim": 8})
    without_eps = transformers.Cohere2MoeConfig(**SHAPE)  # its rms_norm_eps is None
    odd = transformers.SeedOssConfig(**{**SHAPE, "num_attention_heads": 6, "hidden_size": 32})  # 6 heads of 8
    for config, heads in ((mixed, 4), (without_eps, 4), (odd, 6)):
        shape = DrafterConfig(**drafter_shape(config))
        assert (shape.num_attention_heads, shape.head_dim, shape.rms_norm_eps) == (heads, 8, 1e-6)
        shape.refuse_nonsense(Path("drafter"), "")
        Drafter(shape)


def test_factors_of_a_part_of_a_head_are_not_the_drafters() -> None:
    """Phi-4-mini turns three quarters of a head, and has a factor for each of these; a drafter turns all."""
    rope = {"rope_type": "longrope", "rope_theta": 5e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    rope |= {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 40}
    shape = DrafterConfig(**drafter_shape(transformers.Phi3Config(**SHAPE, rope_parameters=rope)))
    assert shape.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}
    shape.refuse_nonsense(Path("drafter"), "")
    Drafter(shape)


def test_layers_that_coral_cannot_draft_for_are_refused_by_what_they_do() -> None:
    neo = transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    narrow = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4
    )
    for config, says in ((neo, "local layers that count rows of the cache"), (narrow, "an embedding of width 16")):
        with pytest.raises(TargetError, match=says):
            wrap(transformers.AutoModelForCausalLM.from_config(config), None)


def test_a_hybrid_without_recurrent_layers_is_none() -> None:
    sizes = {
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["attention"] * 2,
        "mamba_n_heads": 4,
    }
    config = transformers.GraniteMoeHybridConfig(**SHAPE, **sizes)
    assert wrap(transformers.AutoModelForCausalLM.from_config(config), None).layer_types == ("full_attention",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_compute_with_the_keys_themselves_are_decoded_as_they_are(dtype: torch.dtype) -> None:
    """DeepSeek's attention multiplies what the cache gives with its weights: float32 rows do not fit bfloat16 ones."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.MiniCPM3Config(**{**SHAPE, "num_key_value_heads": 4, "head_dim": 8}, **latent)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        target = wrap(model, None)
    assert target.exact == (dtype == torch.float32)
    assert [str(one.message).split(":")[0] for one in said if one.category is CoralWarning] == (
        [] if target.exact else ["MiniCPM3ForCausalLM attends in a way of its own"]
    )
    assert len(ids := [token for event in plain(target, [3, 4, 5], Sampler(), 6) for token in event.new_ids]) >= 1
    own_BT = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False)
    assert dtype == torch.bfloat16 or own_BT[0, 3:].tolist() == ids


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LONGCAT = {"num_hidden_layers": 8, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LONGCAT |= {"v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4, "moe_topk": 2, "expert_ffn_hidden_size": 16}
LONGCAT |= {"n_routed_experts": 4, "zero_expert_num": 1, "ffn_hidden_size": 48}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "more"), [("OlmoeConfig", {}), ("JetMoeConfig", {"kv_channels": 8})])
def test_experts_are_not_said_to_be_exact(name: str, more: dict[str, int], dtype: torch.dtype) -> None:
    """An expert's product has as many rows as are sent to it, and in 16 bits its last bits depend on their number."""
    config = getattr(transformers, name)(**SHAPE, **EXPERTS, **more)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        target = wrap(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype), None)
    assert not target.exact
    told = [str(one.message) for one in said if one.category is CoralWarning]
    assert len(told) == (dtype == torch.bfloat16)
    assert all("sends tokens to experts: in bfloat16, a drafted answer may differ" in one for one in told)


def test_a_table_for_images_is_no_expert() -> None:
    """Gemma 4's vision tower holds one of three axes, and its text layers are exact."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model.vision_table = torch.nn.Parameter(torch.zeros(2, 4, 8))
    assert wrap(model, None).exact


def test_the_width_of_one_expert_is_not_the_drafters() -> None:
    for name, own, width in (
        ("OlmoeConfig", 16, 96),
        ("GraniteMoeConfig", 16, 96),
        ("MixtralConfig", 112, 112),
        ("MixtralConfig", 80, 80),
        ("Qwen3MoeConfig", 64, 64),  # its experts have a width of their own
        ("LlamaConfig", 48, 48),
    ):
        config = getattr(transformers, name)(**{**SHAPE, "intermediate_size": own})
        assert drafter_shape(config)["intermediate_size"] == width, name


def test_taps_of_layers_that_the_model_does_not_give_are_refused() -> None:
    """LongCat-Flash's layers hold two attentions each, and its config counts these."""
    config = transformers.LongcatFlashConfig(**{**SHAPE, **LONGCAT})
    target = wrap(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), None)
    with pytest.raises(TargetError, match=r"the inputs of 4 layers, and .* Set train\.preset=drawn train\.shape="):
        target.tapping(tap_layers(config)).forward(torch.tensor([[3, 4, 5]]))


def test_a_model_without_a_part_below_its_head_is_refused() -> None:
    """Llama 3.2 Vision's text model names another part than it has."""
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**SHAPE, cross_attention_layers=[1])
    with pytest.raises(TargetError, match="does not say which part of it lies below its LM head"):
        wrap(transformers.MllamaForCausalLM(config), None)


def test_attention_that_takes_no_mask_is_refused_with_the_one_that_does() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TargetError, match='attends by flash_attention_2, .* Load it with attn_implementation="sdpa"'):
        wrap(model, None)


def test_a_refused_model_stays_as_it_was() -> None:
    """The probe's refusal comes after the layers were exchanged, so that they are given back."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE)).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    own = model.forward
    model.forward = lambda *args, **kwargs: dataclasses.replace(out := own(*args, **kwargs), logits=out.logits + 99)

    def state() -> list[object]:
        modules = [(type(module), module.training) for module in model.modules()]
        return [modules, [weight.requires_grad for weight in model.parameters()], model.config._attn_implementation]

    before = state()
    with pytest.raises(TargetError, match="misses its own logits"):
        wrap(model, None)
    assert state() == before
