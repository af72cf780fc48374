"""What is refused, each with one line that names the tensor or the reason, and nothing written."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coral_core.artifacts import Manifest
from coral_core.drafter.load import FILES, load_drafter
from coral_core.errors import ArtifactError, CoralError, TargetError
from coral_core.export.bring_in import bring_in
from coral_core.export.folder import check_folder
from coral_core.export.layouts import LAYOUTS
from coral_core.export.run import export_engine, export_hf, open_source
from coral_core.export.wide import WIDE
from coral_core.target.target import Target
from tests.export.helpers import RECIPE, publish, random_drafter
from tests.tiny import FAMILIES, tiny_target


def exported(tmp_path: Path, to: str = "vllm") -> tuple[Target, Path]:
    target = tiny_target("llama")
    return target, export_engine(to, publish(tmp_path / "a", target, random_drafter(target)), target, tmp_path / "a")


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(tmp_path: Path, folder: Path, target: Target) -> str:
    """The one line with which the import refuses; no drafter may be left."""
    with pytest.raises(CoralError) as caught:
        bring_in(str(folder), tmp_path / "b", target)
    assert not (tmp_path / "b" / "drafter").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_tensor_is_named(tmp_path):
    target, folder = exported(tmp_path)
    rewrite(folder, lambda weights: weights.pop("layers.0.mlp.up_proj.weight"))
    assert "lacks tensor 'layers.0.mlp.up_proj.weight'" in refused(tmp_path, folder, target)


def test_an_extra_tensor_is_named(tmp_path):
    target, folder = exported(tmp_path)
    rewrite(folder, lambda weights: weights.update({"layers.0.input_layernorm.weight": torch.ones(32)}))
    assert "unknown tensor 'layers.0.input_layernorm.weight'" in refused(tmp_path, folder, target)


@pytest.mark.parametrize("name", ["fc.weight", "embed_tokens.weight"])
def test_a_tensor_of_another_shape_is_named(tmp_path, name):
    target, folder = exported(tmp_path)
    rewrite(folder, lambda weights: weights.update({name: torch.ones(31, 64)}))
    assert f"tensor '{name}' has shape (31, 64), not" in refused(tmp_path, folder, target)


def test_a_bias_that_the_config_promises_is_missed(tmp_path):
    target, folder = exported(tmp_path, "eagle")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bias": True}))
    assert "lacks tensor 'fc.bias', which its config.json promises" in refused(tmp_path, folder, target)


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, save):
    target, folder = exported(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save({**weights, "fc.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "reading it could run code" in refused(tmp_path, folder, target)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_is_named(tmp_path):
    target, folder = exported(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"cannot read {path}" in refused(tmp_path, folder, target)
    path.unlink()
    assert "neither model.safetensors nor pytorch_model.bin is there" in refused(tmp_path, folder, target)


@pytest.mark.parametrize("raw", [b"", b"hello", b"\x80\x02", b"./" + bytes(600), b"version https://git-lfs.github.com"])
def test_what_is_no_file_of_weights_is_one_line(tmp_path, raw):
    """torch's unpickler raised IndexError and KeyError, with a traceback, for an empty file and for a page of text."""
    target, folder = exported(tmp_path)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(raw)
    assert str(path) in refused(tmp_path, folder, target)
    torch.save({1: torch.ones(2)}, path)
    assert "is not a table of named tensors" in refused(tmp_path, folder, target)


def test_what_the_pickle_would_call_is_named(tmp_path):
    """And nothing of torch's page of advice on how to allow it."""
    target, folder = exported(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert refused(tmp_path, folder, target).endswith(
        "reading it could run code (it calls getattr). Import a safetensors file"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(tmp_path, dtype):
    target, folder = exported(tmp_path)
    rewrite(folder, lambda weights: weights.update({"fc.weight": weights["fc.weight"].to(dtype)}))
    assert f"tensor 'fc.weight' is {dtype}" in refused(tmp_path, folder, target)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    target, folder = exported(tmp_path)
    rewrite(folder, lambda weights: weights["layers.0.mlp.up_proj.weight"].view(-1)[7:8].fill_(value))
    assert "tensor 'layers.0.mlp.up_proj.weight' holds numbers that are not finite" in refused(tmp_path, folder, target)


@pytest.mark.parametrize("name", ["d2t", "midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"])
def test_another_kind_of_drafter_is_told_apart(tmp_path, name):
    """Also as vLLM names an EAGLE-3 layer, and where the config promises a bias that only EAGLE-1 has.

    A target of two layers has no three that EAGLE-3 would read.
    """
    target, folder = exported(tmp_path, "eagle")
    rewrite(folder, lambda weights: weights.update({name: torch.zeros(32)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bias": True}))
    assert "has no eagle_aux_hidden_state_layer_ids" in refused(tmp_path, folder, target)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "is no Llama config"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1; it must be a whole number above 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "its rope_theta must be a number above 0"),
        ({"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}, "which transformers refuses (KeyError: 'x')"),
    ],
)
def test_a_config_that_is_no_drafters_is_refused(tmp_path, change, words):
    target, folder = exported(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert words in refused(tmp_path, folder, target)
    (folder / "config.json").write_text("[]")
    assert "is not a config" in refused(tmp_path, folder, target)


def own_format(tmp_path: Path) -> tuple[Target, Path]:
    target = tiny_target("llama")
    return target, export_hf(publish(tmp_path / "a", target, random_drafter(target), head=True), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 100}, "is for a vocabulary of 100 and 32 hidden; the target has 96 and 32"),
        ({"hidden_size": "abc"}, "hidden_size is 'abc'; it must be a whole number above 0"),
        ({"rope_parameters": {}}, "rope_parameters is {}; its rope_theta must be a number above 0"),
    ],
)
def test_corals_own_config_is_checked_as_well(tmp_path, change, words):
    """An empty `rope_parameters` was silently replaced by Llama's, another vocabulary noticed only by the export."""
    target, folder = own_format(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    Manifest.read(folder, "drafter", "").sealed(folder, *FILES).write(folder)  # as if coral itself had written it
    assert words in refused(tmp_path, folder, target)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x")])
@pytest.mark.parametrize("name", ["head.safetensors", "manifest.json"])
def test_a_damaged_head_is_refused_before_the_drafter_is_published(tmp_path, name, damage):
    """A head without its tensors was taken, and one without its manifest left the drafter behind."""
    target, folder = own_format(tmp_path)
    damage(folder / "head" / name)
    assert str(folder / "head") in refused(tmp_path, folder, target)


def test_the_drafter_of_another_target_is_told_by_its_embedding(tmp_path):
    """Same shapes throughout: only the embedding that it was trained with shows it."""
    _, folder = exported(tmp_path)
    assert "was trained for another target: its embed_tokens.weight is" in refused(
        tmp_path, folder, tiny_target("llama", seed=1)
    )


def test_the_drafter_of_a_target_of_another_size_is_refused(tmp_path):
    target, folder = exported(tmp_path)
    rewrite(folder, lambda weights: weights.pop("embed_tokens.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "is for a vocabulary of 100 and 32 hidden; the target has 96 and 32" in refused(tmp_path, folder, target)


def test_an_import_never_replaces_another_drafter(tmp_path):
    target, folder = exported(tmp_path)
    publish(tmp_path / "b", target, random_drafter(target, seed=5))
    before = (tmp_path / "b" / "drafter" / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match=r"holds another drafter .* Import into a run of its own: name="):
        bring_in(str(folder), tmp_path / "b", target)
    assert (tmp_path / "b" / "drafter" / "model.safetensors").read_bytes() == before


def test_what_is_no_folder_and_no_hub_id_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no folder .*nowhere; give the folder of a drafter, or a Hub id"):
        bring_in(str(tmp_path / "nowhere"), tmp_path / "b", tiny_target("llama"))


SERVED = {
    "vllm": {"llama", "qwen2", "qwen3", "mistral-sliding", "gemma", "gemma3-mixed", "phi3", "granite"},
    "sglang": {"llama", "qwen2", "qwen3", "mistral-sliding", "gemma3-mixed", "phi3"},
    "eagle": {"llama", "qwen2"},
}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gets_a_folder_or_a_reason(tmp_path, to, family):
    target = tiny_target(family)
    source = publish(tmp_path, target, random_drafter(target))
    if family in SERVED[to]:
        assert export_engine(to, source, target, tmp_path).exists()
        return
    with pytest.raises((TargetError, ArtifactError), match=LAYOUTS[to].engine) as caught:
        export_engine(to, source, target, tmp_path)
    assert "coral export --to hf" in str(caught.value)
    assert not (tmp_path / "export").exists()


TYPES = {"gpt-oss": "gpt_oss", "Gemma-3": "gemma3_text"}
"""What the page calls otherwise than the models' configs do."""


def test_the_page_names_the_targets_that_each_engine_takes():
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    takes = {layout: set() for layout in LAYOUTS}
    for names, *marks in rows[2:]:
        types = {TYPES.get(name, name.lower().replace("-", "")) for name in names.split(", ") if name != "others"}
        for layout, mark in zip(takes, marks, strict=True):
            assert mark in ("yes", "no")
            takes[layout] |= types if mark == "yes" else set()
            assert all(bool(LAYOUTS[layout].why_not(name)) == (mark == "no") for name in types), (names, layout)
    assert takes == {layout: LAYOUTS[layout].targets - {"qwen3_moe"} for layout in LAYOUTS}


def test_the_targets_of_each_engine_for_eagle_3s_shape():
    taken = {"llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"}
    expected = dict.fromkeys(("vllm", "sglang", "speculators"), taken) | {"eagle": {"llama", "qwen2", "mixtral"}}
    assert {layout: set(WIDE[layout].targets) for layout in WIDE} == expected
    assert all(WIDE[layout].why_not("gemma") for layout in WIDE)


def lent_with(target: Target, **changes: object) -> Target:
    return dataclasses.replace(target, lent=dataclasses.replace(target.lent, **changes))


@pytest.mark.parametrize(
    ("to", "changes", "words"),
    [
        ("vllm", {"head_bias_V": torch.ones(96)}, "LM head has a bias"),
        ("vllm", {"logit_softcap": 30.0}, "caps its logits at 30"),
        ("sglang", {"logit_scale": 0.5}, "scales its logits by 0.5; SGLang would not"),
        (
            "sglang",
            {"embed_VD": torch.ones(95, 32)},
            "is for a vocabulary of 96 and 32 hidden; the target has 95 and 32",
        ),
    ],
)
def test_what_an_engine_leaves_out_of_the_logits_is_refused(tmp_path, to, changes, words):
    target = tiny_target("llama")
    source = publish(tmp_path, target, random_drafter(target))
    with pytest.raises(CoralError, match=words):
        export_engine(to, source, lent_with(target, **changes), tmp_path)
    assert not (tmp_path / "export").exists()


def test_vllm_is_told_the_factor_on_the_logits(tmp_path):
    target = tiny_target("granite")
    folder = export_engine("vllm", publish(tmp_path, target, random_drafter(target)), target, tmp_path)
    assert json.loads((folder / "config.json").read_text())["logit_scale"] == target.lent.logit_scale == 0.5


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("to", "changes", "words"),
    [
        ("vllm", {"fc_bias": True}, "fc has a bias that is not zero, and vLLM's has none"),
        ("vllm", {"rope_parameters": LONG}, "vLLM computes RoPE of type 'longrope' otherwise"),
        ("sglang", {"rope_parameters": LONG}, "SGLang computes RoPE of type 'longrope' otherwise"),
        ("sglang", {"rope_parameters": YARN | {"attention_factor": 1.2}}, "SGLang does not read 'attention_factor'"),
        ("eagle", {"rope_parameters": YARN}, "EAGLE's code computes RoPE of type 'yarn' otherwise"),
        ("eagle", {"head_dim": 16}, "needs heads of hidden / heads; the drafter has 4 heads of 16 for 32 hidden"),
    ],
)
def test_a_drafter_that_the_engine_would_compute_otherwise_is_refused(tmp_path, to, changes, words):
    target = tiny_target("llama")
    source = publish(tmp_path, target, random_drafter(target, **changes))
    with pytest.raises(ArtifactError, match=words):
        export_engine(to, source, target, tmp_path)
    assert not (tmp_path / "export").exists()


def test_a_bias_of_zeros_goes_to_vllm_without_it(tmp_path):
    target = tiny_target("llama")
    drafter = random_drafter(target, fc_bias=True)
    drafter.fc.bias.zero_()
    folder = export_engine("vllm", publish(tmp_path, target, drafter), target, tmp_path)
    assert "fc.bias" not in load_file(folder / "model.safetensors")


def test_the_drafter_of_another_target_is_not_exported(tmp_path):
    target = tiny_target("llama")
    publish(tmp_path, target, random_drafter(target))
    with pytest.raises(ArtifactError, match="was made for target .*, and this target is"):
        open_source(RECIPE, tmp_path, dataclasses.replace(target, fingerprint="f" * 16))


def test_a_folder_that_is_not_as_the_loader_wants_it_is_caught_before_it_gets_its_name(tmp_path):
    _, folder = exported(tmp_path)
    config = load_drafter(tmp_path / "a" / "drafter").config
    rewrite(folder, lambda weights: weights.pop("fc.weight"))
    with pytest.raises(ArtifactError, match=r"tensor 'fc.weight' is missing, and vLLM expects \(32, 64\)"):
        check_folder(LAYOUTS["vllm"], config, folder)
    rewrite(folder, lambda weights: weights.update({"fc.weight": torch.ones(32, 64), "fc.bias": torch.ones(32)}))
    with pytest.raises(ArtifactError, match=r"tensor 'fc.bias' is \(32,\), and vLLM expects none of that name"):
        check_folder(LAYOUTS["vllm"], config, folder)
    rewrite(folder, lambda weights: weights.pop("fc.bias"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"attention_bias": True}))
    with pytest.raises(ArtifactError, match="attention_bias is True, and vLLM expects False"):
        check_folder(LAYOUTS["vllm"], config, folder)
