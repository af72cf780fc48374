"""Folders of EAGLE-3's shape for engines: names, keys, bits, and back."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from coral_core.artifacts import Manifest
from coral_core.bench.contenders import Contender
from coral_core.bench.methods import load_method
from coral_core.drafter.checkpoint import read_checkpoint
from coral_core.drafter.load import load_drafter
from coral_core.errors import ArtifactError, TargetError
from coral_core.export import gguf_file
from coral_core.export.bring_in import bring_in
from coral_core.export.layouts import LAYOUTS
from coral_core.export.run import GGUF, export_engine, formats, serve_command
from coral_core.export.wide import WIDE
from coral_core.recipe.loader import load_recipe
from coral_core.recipe.schema import Recipe
from tests.export.helpers import publish, random_drafter
from tests.export.reference import WideReference
from tests.tiny import VOCAB, tiny_target

LAYERS, TAPS = 8, (2, 4, 5)
LIST = "eagle_aux_hidden_state_layer_ids"
LAYER = {
    "self_attn.q_proj.weight": (32, 64),
    "self_attn.k_proj.weight": (16, 64),
    "self_attn.v_proj.weight": (16, 64),
    "self_attn.o_proj.weight": (32, 32),
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
    "input_layernorm.weight": (32,),
    "hidden_norm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
}


def table(prefix, **more):
    shared = {"embed_tokens.weight": (VOCAB, 32), "fc.weight": (32, 96), "norm.weight": (32,)}
    return {f"{prefix}{name}": shape for name, shape in LAYER.items()} | shared | more


HEAD = {"lm_head.weight": (VOCAB, 32)}
TABLES = {
    "vllm": table("midlayer.", **HEAD),
    "sglang": table("midlayer."),
    "eagle": table("midlayer.", **HEAD),
    "speculators": table("layers.0.", **HEAD),
}
KEYS = {
    "vllm": {"draft_vocab_size": VOCAB, LIST: [2, 4, 5], "num_aux_hidden_states": 3, "model_type": "llama"},
    "sglang": {"draft_vocab_size": None, LIST: None, "eagle_config": {LIST: [1, 3, 4], "use_aux_hidden_state": True}},
    "eagle": {"draft_vocab_size": VOCAB, LIST: [2, 4, 5], "num_hidden_layers": 1},
    "speculators": {"draft_vocab_size": VOCAB, LIST: [2, 4, 5], "speculators_model_type": "eagle3", "fc_norm": False},
}


def deep(family="llama"):
    return tiny_target(family, layers=LAYERS)


@pytest.mark.parametrize("to", WIDE)
def test_a_folder_has_the_names_shapes_and_keys_of_the_engines_loader(tmp_path, to):
    target = deep()
    folder = export_engine(to, publish(tmp_path, target, random_drafter(target, taps=TAPS)), target, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == TABLES[to]
    values = json.loads((folder / "config.json").read_text())
    assert {key: values.get(key) for key in KEYS[to]} == KEYS[to]
    assert values["norm_before_residual"] is False
    assert values["norm_output"] is False
    assert values["target_hidden_size"] == 32
    llama = values.get("transformer_layer_config", values)
    assert (llama["rope_theta"], llama["attention_bias"], llama["tie_word_embeddings"]) == (10000.0, False, False)
    assert not {"taps", "fc_bias"} & {*values, *llama}
    assert Manifest.read(folder, "export", "").inputs["target"] == target.fingerprint


@pytest.mark.parametrize("to", WIDE)
@pytest.mark.parametrize("rows", [0, 40])
def test_export_and_import_leave_every_bit(tmp_path, to, rows):
    target = deep()
    drafter = random_drafter(target, taps=TAPS)
    token_C = torch.arange(VOCAB).flip(0)[:rows] if rows else None
    folder = export_engine(to, publish(tmp_path / "a", target, drafter), target, tmp_path / "a", token_C)
    bring_in(str(folder), tmp_path / "b", target)
    back = load_drafter(tmp_path / "b" / "drafter")
    assert dataclasses.replace(back.config, head_dim=8, draft_vocab_size=0) == drafter.config
    assert back.config.draft_vocab_size == rows
    assert all(torch.equal(back.state_dict()[name], value) for name, value in drafter.state_dict().items())
    if rows:
        recipe = load_recipe(None, ["name=b", "decode.tree=fixed", "decode.draft_nodes=4", "decode.draft_depth=2"])
        method = load_method(Contender(recipe, tmp_path / "b", "b"), target)
        assert method.facts["head"] == {"kind": "own", "rows": rows}, "and no grouped head is asked for"
        assert back.draft_tokens.tolist() == list(range(VOCAB - rows, VOCAB))
        assert torch.equal(back.lm_head.weight, target.lent.head_VD[back.draft_tokens])
        assert load_file(folder / "model.safetensors")["t2d"].nonzero()[:, 0].tolist() == back.draft_tokens.tolist()


def test_our_drafter_and_an_independent_layer_agree_on_the_exported_folder(tmp_path):
    target = deep()
    folder = export_engine("vllm", publish(tmp_path, target, random_drafter(target, taps=TAPS)), target, tmp_path)
    torch.manual_seed(2)
    ids, tap_TI = torch.randint(0, VOCAB, (11,)), torch.randn(11, 96)

    def causal(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    drafter = read_checkpoint(folder).drafter
    turn = drafter.rope(torch.arange(11)[None], torch.float32)
    out_BTD = drafter.hidden(drafter(target.lent.embed(ids)[None], drafter.read(tap_TI[None]), turn, causal))
    torch.testing.assert_close(out_BTD[0], WideReference(folder)(ids.tolist(), tap_TI), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", WIDE)
def test_a_tied_head_is_written_beside_the_embedding(tmp_path, to):
    """SmolLM2's was refused by safetensors: both were one storage."""
    target = deep()
    target = dataclasses.replace(target, lent=dataclasses.replace(target.lent, head_VD=target.lent.embed_VD))
    folder = export_engine(to, publish(tmp_path, target, random_drafter(target, taps=TAPS)), target, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights.get("lm_head.weight", target.lent.embed_VD), weights["embed_tokens.weight"])


@pytest.mark.parametrize(("to", "family"), [("vllm", "gemma3-mixed"), ("sglang", "gemma3-mixed"), ("vllm", "gpt2")])
def test_a_target_that_is_served_in_another_shape_is_told_how_to_train_it(tmp_path, to, family):
    target = deep(family)
    with pytest.raises(TargetError, match=f"{LAYOUTS[to].engine} cannot draft for a target") as caught:
        export_engine(to, publish(tmp_path, target, random_drafter(target, taps=TAPS)), target, tmp_path)
    served = not LAYOUTS[to].why_not(target.model.config.model_type)
    assert ("coral train train.preset=drawn" in str(caught.value)) is served is (family != "gpt2")


@pytest.mark.parametrize(
    ("to", "changes", "words"),
    [
        ("sglang", {"norm_before_residual": True}, "SGLang has no norm_before_residual"),
        ("eagle", {"norm_output": True}, "EAGLE's code has no norm_output"),
        ("eagle", {"fc_norm": True}, "EAGLE's code has no fc_norm"),
        ("eagle", {"taps": (1, 4, 5)}, r"EAGLE's code reads layers \(2, 4, 5\) of such a target, .* \(1, 4, 5\)"),
        ("sglang", {"taps": (1, 4)}, "SGLang reads three layers; this drafter 2"),
        (GGUF, {"norm_output": True}, "llama.cpp has no norm_output"),
        (GGUF, {"fc_norm": True}, "llama.cpp has no fc_norm"),
        (GGUF, {"taps": (1, 4)}, "llama.cpp reads three layers"),
    ],
)
def test_what_an_engine_would_not_follow_is_refused(tmp_path, to, changes, words):
    target = deep()
    source = publish(tmp_path, target, random_drafter(target, **{"taps": TAPS, **changes}))
    with pytest.raises(ArtifactError, match=words):
        export_engine(to, source, target, tmp_path)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("to", ["vllm", "sglang", "speculators"])
def test_the_later_norms_come_back(tmp_path, to):
    """The key norm_output means two things in the folders of others: coral's say that they are its own."""
    target, later = deep(), {"norm_output": True, "fc_norm": True, "norm_before_residual": to != "sglang"}
    drafter = random_drafter(target, taps=TAPS, **later)
    folder = export_engine(to, publish(tmp_path / "a", target, drafter), target, tmp_path / "a")
    assert {f"fc_norm.{tap}.weight" for tap in range(3)} <= load_file(folder / "model.safetensors").keys()
    bring_in(str(folder), tmp_path / "b", target)
    assert dataclasses.replace(load_drafter(tmp_path / "b" / "drafter").config, head_dim=8) == drafter.config


def test_the_older_shape_has_no_such_folders(tmp_path):
    target = tiny_target()
    source = publish(tmp_path, target, random_drafter(target))
    for to in ("speculators", GGUF):
        with pytest.raises(ArtifactError, match="EAGLE-3's shape only"):
            export_engine(to, source, target, tmp_path)
    assert formats(source.drafter) == ("vllm", "sglang", "eagle")
    assert formats(random_drafter(deep(), taps=TAPS)) == ("vllm", "sglang", "eagle", "speculators", GGUF)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_bias_V": torch.ones(VOCAB)}, "LM head has a bias, which llama.cpp's drafter leaves out"),
        ({"logit_scale": 0.5}, "scales its logits by 0.5; llama.cpp would not"),
        ({"logit_softcap": 30.0}, "caps its logits at 30; llama.cpp would not"),
    ],
)
def test_what_llama_cpp_leaves_out_of_the_logits_is_refused(tmp_path, changes, words):
    target = deep()
    source = publish(tmp_path, target, random_drafter(target, taps=TAPS))
    target = dataclasses.replace(target, lent=dataclasses.replace(target.lent, **changes))
    with pytest.raises(TargetError, match=words):
        export_engine(GGUF, source, target, tmp_path)
    assert not (tmp_path / "export").exists()


def test_a_target_whose_layers_no_engine_hands_out_is_refused(tmp_path):
    target = deep("gpt2")
    with pytest.raises(TargetError, match="vLLM cannot draft for a target of type 'gpt2'"):
        export_engine("vllm", publish(tmp_path, target, random_drafter(target, taps=TAPS)), target, tmp_path)


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("vllm", '"method": "eagle3"'),
        ("sglang", "--speculative-algorithm EAGLE3 "),
        ("eagle", "use_eagle3=True"),
        ("speculators", "vllm serve made"),
        (GGUF, "--model-draft made/drafter.gguf --spec-type draft-eagle3 --spec-draft-n-max 8"),
    ],
)
def test_the_command_names_the_shape(to, words):
    config = random_drafter(deep(), taps=TAPS).config
    assert words in serve_command(to, Recipe(name="tiny"), config, ("org/model", "made"), with_map=False)


def test_queries_and_keys_are_laid_out_for_neighbours_drawn():
    """Two heads of four: halves 0 1 | 2 3 become pairs 0 2 | 1 3."""
    config = dataclasses.replace(random_drafter(deep(), taps=TAPS).config, head_dim=4)
    weight_XD = torch.arange(8.0)[:, None]
    assert gguf_file.neighbours(weight_XD, config)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_gguf_file_holds_every_tensor_by_llama_cpps_names(tmp_path):
    gguf = pytest.importorskip("gguf", reason="no gguf here: pip install '.[gguf]'")
    target = deep()
    source = publish(tmp_path, target, random_drafter(target, taps=TAPS))
    token_C = torch.tensor([5, 90, 7])
    reader = gguf.GGUFReader(export_engine(GGUF, source, target, tmp_path, token_C) / "drafter.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert sorted(tensors) == sorted(
        ["fc.weight", "output_norm.weight", "output.weight", "d2t"]
        + [f"blk.0.{name}.weight" for name in gguf_file.LAYER.values()]
    )
    assert tensors["d2t"].tolist() == [5, 7, 90]
    assert torch.equal(tensors["output.weight"], target.lent.head_VD[[5, 7, 90]])
    assert torch.equal(tensors["blk.0.attn_norm_2.weight"], source.drafter.layers[0].hidden_norm.weight)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "eagle3"
    assert fields["eagle3.target_layers"] == fields["eagle3.extract_layers"] == list(TAPS)
    assert (fields["eagle3.vocab_size"], fields["eagle3.target_hidden_size"]) == (VOCAB, 32)
