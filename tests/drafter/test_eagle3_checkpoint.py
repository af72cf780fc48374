"""EAGLE-3 checkpoints as their writers lay them out."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coral_core.artifacts import Manifest
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.checkpoint import read_checkpoint
from coral_core.drafter.load import build_drafter, load_drafter, save_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.export.bring_in import bring_in
from coral_core.recipe.loader import load_recipe
from coral_core.run import Run, whole_head
from tests.export.helpers import random_drafter
from tests.tiny import VOCAB, tiny_target

TAPS = (1, 2, 3)
TOKENS = [2, 3, 4, *range(10, 95, 3)]
LIST = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def target():
    return dataclasses.replace(tiny_target(layers=4), stop_ids=frozenset())


def own_head(drafter):
    """With 32 rows of its own, random ones."""
    config = dataclasses.replace(drafter.config, draft_vocab_size=len(TOKENS))
    torch.manual_seed(5)
    d2t_C = torch.tensor(TOKENS) - torch.arange(len(TOKENS))
    weights = drafter.state_dict() | {"lm_head.weight": torch.randn(len(TOKENS), 32) / 5, "d2t": d2t_C}
    return build_drafter(config, weights, source="", remedy="")


def write(folder, drafter, *, layer="midlayer.", head=True, embed=None, **changes):
    """A folder as EAGLE's authors, SpecForge and vLLM's users have it."""
    folder.mkdir()
    config, weights = drafter.config, dict(drafter.state_dict())
    weights = {name.replace("layers.0.", layer): value.clone() for name, value in weights.items()}
    if head and config.draft_vocab_size:
        weights["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, drafter.draft_tokens, True)
    if embed is not None:
        weights["embed_tokens.weight"] = embed.clone()
    save_file(weights, folder / "model.safetensors")
    values = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": 160,
        "rope_theta": 10000.0,
        "draft_vocab_size": config.draft_vocab_size or None,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))
    return folder


def change(folder, **tensors):
    weights = load_file(folder / "model.safetensors") | tensors
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


def refused(folder, run, target):
    with pytest.raises(ArtifactError) as caught:
        bring_in(str(folder), run, target)
    assert "\n" not in str(caught.value)
    assert not (run / "drafter").exists()
    return str(caught.value)


@pytest.mark.parametrize("layer", ["midlayer.", "layers.0."])
def test_a_checkpoint_with_a_head_of_its_own_comes_in_whole_and_decodes(tmp_path, target, layer):
    drafter = own_head(random_drafter(target, taps=TAPS))
    folder = write(tmp_path / "made", drafter, layer=layer, embed=target.lent.embed_VD)
    bring_in(str(folder), tmp_path / "run", target)
    back = load_drafter(tmp_path / "run" / "drafter")
    assert back.config == drafter.config
    assert all(torch.equal(back.state_dict()[name], value) for name, value in drafter.state_dict().items())
    assert back.draft_tokens.tolist() == TOKENS

    head = whole_head(back, target.lent)
    found = head.candidates(torch.eye(32)[:3])
    torch.testing.assert_close(found.logit_NC, drafter.lm_head.weight.T[:3])
    assert found.token_C.tolist() == TOKENS
    engine = Engine(target, back, head, TreeShape(depth=3, nodes=8, topk=3))
    prompt = [1, 9, 40, 3]
    told = [token for event in engine.decode(prompt, Sampler(), 16) for token in event.new_ids]
    assert told == [token for event in plain(target, prompt, Sampler(), 16) for token in event.new_ids]


def test_a_run_drafts_from_the_drafters_own_head(tmp_path, target):
    drafter = own_head(random_drafter(target, taps=TAPS))
    bring_in(str(write(tmp_path / "made", drafter)), tmp_path / "run", target)
    recipe = load_recipe(None, ["name=own", "decode.tree=fixed"])
    engine = Run(recipe, tmp_path / "run").engine(target)
    assert engine.head.token_C.tolist() == TOKENS
    assert engine.target.taps == TAPS


def test_layers_are_counted_as_each_writer_does(tmp_path, target):
    """None said: EAGLE's rule. At the top, inputs; within eagle_config, outputs, which are the next layer's inputs."""
    drafter = random_drafter(target, taps=TAPS)
    said = {
        "rule": ({}, TAPS),
        "top": ({LIST: [0, 1, 3]}, (0, 1, 3)),
        "nested": ({"eagle_config": {LIST: [0, 1, 2], "use_aux_hidden_state": True}}, (1, 2, 3)),
        "empty": ({"eagle_config": {LIST: []}}, TAPS),
    }
    for name, (keys, taps) in said.items():
        bring_in(str(write(tmp_path / name, drafter, **keys)), tmp_path / f"run-{name}", target)
        assert load_drafter(tmp_path / f"run-{name}" / "drafter").config.taps == taps


def test_a_folder_of_speculators_comes_in(tmp_path, target):
    drafter = random_drafter(target, taps=(0, 1, 3), norm_output=True, fc_norm=True, norm_before_residual=True)
    folder = write(tmp_path / "made", drafter, layer="layers.0.")
    nested = json.loads((folder / "config.json").read_text())
    del nested["architectures"], nested["draft_vocab_size"]
    values = {"speculators_model_type": "eagle3", "architectures": ["Eagle3DraftModel"], LIST: [0, 1, 3]}
    values |= {"transformer_layer_config": nested, "norm_output": True, "fc_norm": True, "norm_before_residual": True}
    (folder / "config.json").write_text(json.dumps(values | {"draft_vocab_size": VOCAB}))
    bring_in(str(folder), tmp_path / "run", target)
    back = load_drafter(tmp_path / "run" / "drafter")
    assert back.config == drafter.config
    (folder / "config.json").write_text(json.dumps(values | {"speculators_model_type": "dflash"}))
    assert "speculators_model_type is 'dflash'" in refused(folder, tmp_path / "no", target)


def test_a_head_that_is_the_targets_own_is_lent(tmp_path, target):
    """Engines want it written out; grouped, it is the target's again."""
    drafter = random_drafter(target, taps=TAPS)
    folder = write(tmp_path / "made", drafter, draft_vocab_size=VOCAB)
    change(folder, **{"lm_head.weight": target.lent.head_VD.clone()})
    bring_in(str(folder), tmp_path / "run", target)
    assert load_drafter(tmp_path / "run" / "drafter").config == drafter.config
    change(folder, **{"lm_head.weight": target.lent.head_VD + 0.1})
    bring_in(str(folder), tmp_path / "other", target)
    assert load_drafter(tmp_path / "other" / "drafter").config.draft_vocab_size == VOCAB


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({LIST: [1, 2]}, f"{LIST} names 2 layers, and fc.weight reads 3"),
        ({LIST: [1, 1, 2]}, "taps is [1, 1, 2]; they must be different layers"),
        ({LIST: ["a", 1, 2]}, f"{LIST} is no list of layers"),
        ({"target_hidden_size": 64}, "target_hidden_size is 64, hidden_size 32"),
        ({"norm_before_fc": True}, "norm_before_fc is true"),
        ({"norm_output": True}, "norm_output is true, which means two things"),
        ({"fc_norm": True}, "lacks tensor 'fc_norm.0.weight'"),
        ({"draft_vocab_size": 31}, f"draft_vocab_size is 31; lm_head.weight has {len(TOKENS)} rows"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    ],
    ids=str,
)
def test_keys_that_cannot_be_followed_are_named(tmp_path, target, keys, words):
    folder = write(tmp_path / "made", own_head(random_drafter(target, taps=TAPS)), **keys)
    assert words in refused(folder, tmp_path / "run", target)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"d2t": torch.zeros(len(TOKENS), dtype=torch.int64)}, "'d2t' is all zero"),
        ({"d2t": torch.full((len(TOKENS),), 90)}, f"'d2t' leads to token {VOCAB}"),
        ({"d2t": torch.arange(len(TOKENS)).flip(0) // 2}, "'d2t' leads to the same token twice"),
        ({"d2t": torch.zeros(5, dtype=torch.int64)}, "tensor 'd2t' has shape (5,)"),
        ({"lm_head.weight": torch.zeros(len(TOKENS), 16)}, "tensor 'lm_head.weight' has shape"),
        ({"lm_head.weight": None}, "draft_vocab_size is 32, and there is no lm_head.weight"),
        ({"midlayer.self_attn.q_proj.bias": torch.zeros(32)}, "unknown tensor 'layers.0.self_attn.q_proj.bias'"),
        ({"midlayer.hidden_norm.weight": None}, "lacks tensor 'layers.0.hidden_norm.weight'"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(tmp_path, target, tensors, words):
    folder = write(tmp_path / "made", own_head(random_drafter(target, taps=TAPS)))
    change(folder, **tensors)
    assert words in refused(folder, tmp_path / "run", target)


def test_layers_that_the_target_lacks_are_refused(tmp_path, target):
    folder = write(tmp_path / "made", random_drafter(target, taps=TAPS), **{LIST: [1, 2, 9]})
    assert "reads the input of layer 9 (0 is the first), and LlamaForCausalLM has 4" in refused(
        folder, tmp_path / "run", target
    )


def test_without_its_target_a_checkpoint_must_say_its_layers(tmp_path, target):
    drafter = random_drafter(target, taps=TAPS)
    with pytest.raises(ArtifactError, match=f"has no {LIST}, and which layers are meant depends on the target"):
        Drafter.from_pretrained(write(tmp_path / "silent", drafter))
    folder = write(tmp_path / "made", drafter, **{LIST: list(TAPS)})
    assert Drafter.from_pretrained(folder).config.taps == TAPS
    assert read_checkpoint(folder).embed_VD is None


def test_a_head_of_its_own_cannot_be_grouped(tmp_path, target):
    from coral_core.grouping.stage import group_head
    from tests.training.helpers import tiny_store

    store = tiny_store(tmp_path / "run" / "data", taps=True)
    drafter = own_head(random_drafter(target, taps=TAPS))
    (tmp_path / "run" / "drafter").mkdir()
    save_drafter(drafter, tmp_path / "run" / "drafter")
    inputs = {"target": store.manifest.inputs["target"]}
    Manifest(kind="drafter", fingerprint="e" * 16, inputs=inputs, recipe={}, facts={}).write(
        tmp_path / "run" / "drafter"
    )
    with pytest.raises(ArtifactError, match=r"LM head of its own, of 32 rows \(draft_vocab_size\)"):
        group_head(load_recipe(None, ["name=own"]), tmp_path / "run")
