"""llama.cpp drafts with coral's drafter: the same words as without it, and in each round what coral's chain accepts.

Slow: it runs an interpreter that has xllamacpp (pip install xllamacpp gguf), this one or the one that
CORAL_XLLAMACPP_PYTHON names.
"""

import dataclasses
import json
import random
import re

import pytest
import torch

from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.export.gguf_file import neighbours
from coral_core.export.run import GGUF, export_engine
from coral_core.head.heads import FullHead
from coral_core.recipe.schema import PRESETS
from coral_core.store.shard import Sample
from coral_core.target.capture import tap
from coral_core.target.load import drafter_shape, tap_layers
from coral_core.training.loop import Reports, train
from tests.export.helpers import publish
from tests.export.test_engines import run_engine
from tests.store.helpers import make_store
from tests.tiny import VOCAB, tiny_target
from tests.training.helpers import tiny_spec

pytestmark = pytest.mark.slow
DEPTH, NEW = 4, 32
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def write_target(gguf, target, config, file, end):
    """The target in float32, each token's text its number in brackets; `end` is a token that it never says here."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(8)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"[{token}]" for token in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    kinds = {end: gguf.TokenType.UNKNOWN}
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in range(VOCAB)])
    writer.add_eos_token_id(end)
    writer.add_unk_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in target.model.state_dict().items():
        key = name.removesuffix(".weight")
        if key not in whole:
            _, _, layer, key = key.split(".", 3)
        if key.endswith(("q_proj", "k_proj")):
            weight = neighbours(weight, config)
        own = whole.get(key) or f"blk.{layer}.{NAMES[key]}"
        writer.add_tensor(f"{own}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def trained(target, prompts, folder):
    """A drafter that has learnt the target's own answers to these prompts by heart."""
    taps, samples = tap_layers(target.model.config), []
    for prompt in prompts:
        answer = [token for event in plain(target, prompt, Sampler(), NEW) for token in event.new_ids]
        ids_T = torch.tensor(prompt + answer)
        found = tap(target.tapping(taps), ids_T[None], torch.ones(1, len(ids_T), dtype=torch.bool))
        samples.append(Sample(ids_T, torch.arange(len(ids_T)) >= len(prompt), found.feature_BTD[0], found.tap_BTI[0]))
    facts = {"drafter_config": drafter_shape(target.model.config), "taps": list(taps)}
    store = make_store(folder / "data", samples, lent=target.lent, facts=facts)
    spec = tiny_spec(**{**PRESETS["eagle3"], "unroll_steps": 3, "steps": 150, "learning_rate": 1e-2, "batch_size": 6})
    return train(spec, store, seed=0, work=folder / "work", reports=Reports(log=lambda line: None))


def test_llama_cpp_accepts_what_coral_accepts(tmp_path):
    gguf = pytest.importorskip("gguf", reason="no gguf here: pip install '.[gguf]'")
    target = dataclasses.replace(tiny_target("llama", layers=8), stop_ids=frozenset())
    draw = random.Random(0)
    prompts = [draw.choices(range(3, VOCAB), k=6) for _ in range(12)]
    drafter = trained(target, prompts, tmp_path)
    folder = export_engine(GGUF, publish(tmp_path / "run", target, drafter), target, tmp_path / "run")
    engine = Engine(target, drafter, FullHead(target.lent), TreeShape(depth=DEPTH, nodes=DEPTH, topk=1))
    answers = [list(engine.decode(prompt, Sampler(), NEW)) for prompt in prompts[:4]]
    said = [[token for event in rounds for token in event.new_ids] for rounds in answers]
    end = next(token for token in range(VOCAB) if not any(token in ids for ids in said))
    write_target(gguf, target, drafter.config, tmp_path / "target.gguf", end)
    arguments = (str(DEPTH), str(NEW), json.dumps(prompts[:4]))
    found = run_engine(
        "xllamacpp",
        "llamacpp_decodes.py",
        str(tmp_path / "target.gguf"),
        str(folder / "drafter.gguf"),
        *arguments,
    )
    depths = [0] * (DEPTH + 1)
    for ids, rounds, alone, drafted in zip(said, answers, found["alone"], found["drafted"], strict=True):
        assert [int(token) for token in re.findall(r"\[(\d+)\]", alone["text"])] == ids
        assert drafted["text"] == alone["text"]
        own = [event.accepted_drafts for event in rounds[1:]]
        shared = min(len(own), len(drafted["accepted"]))
        assert shared >= 3
        assert drafted["accepted"][:shared] == own[:shared]
        for accepted in own[:shared]:
            depths[accepted] += 1
    assert depths[DEPTH] > 0
    assert sum(depths[:DEPTH]) > 0, "rounds that accept all tell nothing of the depth"
