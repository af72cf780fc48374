"""A GGUF file is the model that it was made from, is converted once, and is refused in one line where it is no use."""

import dataclasses
import json
import multiprocessing
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub.errors import GatedRepoError

from coral_core import embedded
from coral_core.errors import CoralWarning, DataError, TargetError
from coral_core.recipe.schema import TargetSpec
from coral_core.target import gguf_file, gguf_rope, gguf_splits
from coral_core.target.load import load_target
from tests.tiny import SHAPE, tiny_target

gguf = pytest.importorskip("gguf", reason="pip install '.[gguf]'")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<e>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hugging Face cache, in the test's own folder."""
    import huggingface_hub.utils._cache_assets as assets

    monkeypatch.setattr(assets, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coral" / "gguf"


def write(path: Path, **changes: Any) -> Path:
    """tiny_target("llama") as a GGUF file in float32, as llama.cpp's converter lays it out.

    `changes`: architecture, tokens, merges, template, split (of so many files), leave_out (a tensor's name),
    more (tensors besides), floats (of metadata), strings (likewise), eos (and no end of a turn), pre (how text is
    split).
    """
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(SHAPE["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if "split" in changes:
        writer.add_uint16("split.count", changes["split"])
    if tokens := changes.get("tokens", ["<u>", "<s>", "<e>", "<t>", *(chr(33 + i) for i in range(91)), "ab"]):
        writer.add_tokenizer_model("gpt2")
        if pre := changes.get("pre", "gpt-2"):
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 4 + [1] * 92)
        writer.add_token_merges(changes.get("merges", ["a b"]))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(changes.get("eos", 2))
        if "eos" not in changes:
            writer.add_eot_token_id(3)
    if template := changes.get("template", TEMPLATE):
        writer.add_chat_template(template)
    for name, number in changes.get("floats", {}).items():
        writer.add_float32(name, number)
    for name, text in changes.get("strings", {}).items():
        writer.add_string(name, text)
    for name, values in [*tensors(), *changes.get("more", {}).items()]:
        if name != changes.get("leave_out"):
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors() -> list[tuple[str, np.ndarray]]:
    """The weights under llama.cpp's names; rotary rows in its order, halves interleaved."""
    state = {name: weight.numpy() for name, weight in tiny_target("llama").model.state_dict().items()}
    found = [
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output.weight", state["lm_head.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
    ]
    for layer in range(SHAPE["num_hidden_layers"]):
        for own, theirs in NAMES.items():
            values = state[f"model.layers.{layer}.{own}.weight"]
            found.append((f"blk.{layer}.{theirs}.weight", laid_out(theirs, values)))
    return found


def laid_out(name: str, values: np.ndarray) -> np.ndarray:
    """A weight or bias as llama.cpp's converter lays it out."""
    heads = {"attn_q": SHAPE["num_attention_heads"], "attn_k": SHAPE["num_key_value_heads"]}
    if count := heads.get(name):
        values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def load(path: Path | str) -> Any:
    return load_target(TargetSpec(model=str(path), dtype="float32", device="cpu"))


def test_it_answers_as_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    target = load(write(tmp_path / "tiny.gguf"))
    ids_BT = torch.arange(4, 40)[None]
    wanted_BTV = tiny_target("llama").model(input_ids=ids_BT).logits
    torch.testing.assert_close(target.model(input_ids=ids_BT).logits, wanted_BTV, rtol=0, atol=1e-5)
    assert target.stop_ids == {2, 3}  # the end of the sequence, and of a turn
    assert target.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<e>"
    assert target.tokenizer("ab<e>")["input_ids"] == [95, 2]


def test_biases_of_a_llama_are_read(tmp_path: Path) -> None:
    """Granite Code's files name the architecture llama, and no key of theirs says that it has biases."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)).eval()
    model.load_state_dict(tiny_target("llama").model.state_dict(), strict=False)
    biases = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for own, theirs in list(NAMES.items())[:7]:
            bias = model.get_parameter(f"model.layers.{layer}.{own}.bias")
            torch.nn.init.normal_(bias)
            biases[f"blk.{layer}.{theirs}.bias"] = laid_out(theirs, bias.detach().numpy())
    ids_BT = torch.arange(4, 40)[None]
    found_BTV = load(write(tmp_path / "biased.gguf", more=biases)).model(input_ids=ids_BT).logits
    torch.testing.assert_close(found_BTV, model(input_ids=ids_BT).logits, rtol=0, atol=1e-4)


def angles(target: Any) -> torch.Tensor:
    """How far each half of a head's dimensions turns from one position to the next."""
    return target.model.base_model.rotary_emb.inv_freq


def test_the_scaling_of_the_rotary_embedding_is_read(tmp_path: Path) -> None:
    """transformers leaves it out of a GGUF: Llama 3.1's is a tensor, YaRN's and Gemma 3's are metadata."""
    plain_E = angles(load(write(tmp_path / "plain.gguf")))
    config = transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "llama3", "factor": 8.0, **gguf_rope.LLAMA3}
    )
    wanted_E = transformers.LlamaForCausalLM(config).model.rotary_emb.inv_freq
    factor_E = (plain_E / wanted_E).numpy()
    assert factor_E.min() == 1 and factor_E.max() > 2
    tensor = {"rope_freqs.weight": factor_E}
    torch.testing.assert_close(angles(load(write(tmp_path / "llama3.gguf", more=tensor))), wanted_E)
    scaled = {"floats": {"llama.rope.scaling.factor": 4.0}, "strings": {"llama.rope.scaling.type": "linear"}}
    torch.testing.assert_close(angles(load(write(tmp_path / "linear.gguf", **scaled))), plain_E / 4)
    scaled["strings"] = {"llama.rope.scaling.type": "yarn"}
    yarn = load(write(tmp_path / "yarn.gguf", **scaled))
    assert yarn.model.config.rope_parameters["rope_type"] == "yarn" and yarn.model.config.rope_parameters["factor"] == 4
    scaled["strings"] = {"llama.rope.scaling.type": "none"}
    torch.testing.assert_close(angles(load(write(tmp_path / "none.gguf", **scaled))), plain_E)


@pytest.mark.parametrize(
    "changes",
    [
        {"more": {"rope_freqs.weight": np.array([1, 2, 3, 5], np.float32)}},
        {"more": {"rope_factors_long.weight": np.ones(4, np.float32)}},
        {"strings": {"llama.rope.scaling.type": "longrope"}, "floats": {"llama.rope.scaling.factor": 4.0}},
        {"strings": {"llama.rope.scaling.type": "new"}, "floats": {"llama.rope.scaling.factor": 4.0}},
    ],
)
def test_a_scaling_that_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="scales its rotary embedding in a way that is not read"):
        load(write(tmp_path / "odd.gguf", **changes))


def test_gemmas_global_layers_are_scaled_and_the_largest_ones_attention_too() -> None:
    config = transformers.Gemma3TextConfig(
        hidden_size=64, num_attention_heads=4, head_dim=8, num_hidden_layers=62, layer_types=["full_attention"] * 62
    )
    gguf_rope.apply(config, {"general.architecture": "gemma3"}, {"rope_type": "linear", "factor": 8.0})
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.query_pre_attn_scalar == 16


def test_base_and_window_that_transformers_does_not_read_are_read() -> None:
    said = {"starcoder2.rope.freq_base": 1e6, "phi3.rope.freq_base": 1e4, "phi3.attention.sliding_window": 2047}
    starcoder, phi = transformers.Starcoder2Config(), transformers.Phi3Config()
    gguf_rope.apply(starcoder, {"general.architecture": "starcoder2", **said}, {})
    gguf_rope.apply(phi, {"general.architecture": "phi3", **said}, {})
    assert starcoder.rope_parameters["rope_theta"] == 1e6 and starcoder.sliding_window is None
    assert phi.rope_parameters["rope_theta"] == 1e4 and phi.sliding_window == 2047


def test_what_has_no_rotary_embedding_or_one_that_transformers_reads_is_left_alone() -> None:
    gguf_rope.apply(transformers.GPT2Config(), {"general.architecture": "gpt2"}, {})
    factors = {"rope_freqs.weight": None}
    assert gguf_rope.scaling(Path("x.gguf"), {"general.architecture": "gemma4"}, factors) == {}


def test_an_answer_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    """Gemma's and Phi-3's files name the end of the text alone, and their turns end with another token."""
    assert load(write(tmp_path / "tiny.gguf", eos=0)).stop_ids == {0, 2}
    assert load(write(tmp_path / "bare.gguf", eos=0, template="")).stop_ids == {0}


def test_it_is_converted_once_and_again_when_it_changes(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    folder = gguf_file.unpack(path, torch.float32)
    made = (folder / "config.json").stat().st_mtime_ns
    copy = shutil.copy(path, tmp_path / "the same under another name")
    for again in (path, Path(copy)):
        assert gguf_file.unpack(again, torch.float32) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    write(path, template="other")
    other = gguf_file.unpack(path, torch.float32)
    assert other != folder
    assert gguf_file.unpack(path, torch.bfloat16) not in (other, folder)
    assert {name.name for name in cache.iterdir() if name.is_dir()} == {
        "sums",
        folder.name,
        other.name,
        other.name.replace("float32", "bfloat16"),
    }


def test_a_start_reads_neither_the_file_nor_gguf_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf")
    gguf_file.unpack(path, torch.float32)
    for slow in ("file_sha256", "_check", "_convert"):
        monkeypatch.setattr(gguf_file, slow, None)
    gguf_file.unpack(path, torch.float32)


def _unpack(path: Path, cache: str, made: Any) -> None:
    import huggingface_hub.utils._cache_assets as assets

    assets.HF_ASSETS_CACHE = cache
    convert = gguf_file._convert

    def counted(*args: Any) -> None:
        made.put(args)
        convert(*args)

    gguf_file._convert = counted  # type: ignore[assignment]
    gguf_file.unpack(path, torch.float32)


def test_of_two_processes_at_once_one_converts(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("fork")
    made = context.SimpleQueue()
    both = [context.Process(target=_unpack, args=(path, str(tmp_path / "cache"), made)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    made.get()
    assert made.empty()
    assert len([name for name in cache.iterdir() if name.name.endswith(f"float32-{gguf_file.FORM}")]) == 1


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gguf_file.unpack(path, torch.float32)
    assert [name.name for name in cache.iterdir() if name.is_dir()] == ["sums"]
    gguf_file.unpack(path, torch.float32)


def test_a_file_of_a_hub_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = write(tmp_path / "tiny.gguf"), []

    def download(repo: str, file: str, revision: str, **_: object) -> str:
        asked.append((repo, file, revision))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load("some-one/tiny-GGUF/quants/tiny.Q4_K_M.gguf")
    assert asked == [("some-one/tiny-GGUF", "quants/tiny.Q4_K_M.gguf", "main")]

    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError("404: no such entry.\nSee more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    with pytest.raises(TargetError, match=r"cannot fetch x\.gguf of some-one/tiny from the Hub: 404: no such entry\. "):
        load("some-one/tiny/x.gguf")

    def gated(*_: object, **__: object) -> str:
        raise GatedRepoError("401", response=SimpleNamespace(status_code=401, headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    with pytest.raises(TargetError, match=r"If it is private or gated, .* run: hf auth login$"):
        load("some-one/tiny/x.gguf")


def test_a_template_beside_the_file_serves_where_it_holds_none(tmp_path: Path) -> None:
    from coral_core.target.template import prompt_ids

    path = write(tmp_path / "tiny.gguf", template="")
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(DataError, match=r"tiny\.gguf' has no chat template.* Set target\.chat_template"):
        prompt_ids(load(path).tokenizer, messages)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert prompt_ids(load(path).tokenizer, messages)[-1] == 2


def test_without_a_template_a_dialogue_is_refused_before_minutes_are_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", template="")
    convert = gguf_file._convert
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("converted"))
    spec = TargetSpec(model=str(path), dtype="float32", device="cpu")
    with pytest.raises(
        DataError, match=r"the tokenizer of '.*tiny\.gguf' has no chat template\. Set target\.chat_temp"
    ):
        load_target(spec, dialogues=True)
    monkeypatch.setattr(gguf_file, "_convert", convert)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert load_target(spec, dialogues=True).tokenizer.chat_template == TEMPLATE
    (tmp_path / "chat_template.jinja").unlink()
    vicuna = write(tmp_path / "vicuna.gguf", template="", pre="mpt")
    assert load_target(dataclasses.replace(spec, model=str(vicuna)), dialogues=True).tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("pre", "says"), [("gpt-2", ""), ("smollm", ""), ("qwen2", ""), ("bloom", "is 'bloom'"), ("", "hold")]
)
def test_a_split_that_is_not_known_is_told_once(pre: str, says: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    path = write(tmp_path / "tiny.gguf", pre=pre)
    for first in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load(path)
        told = [str(one.message) for one in said if one.category is CoralWarning]
        assert len(told) == bool(says and first)
        assert all(
            re.search(rf"tiny\.gguf: .*{says}.*Set target\.model to the model's own folder", one) for one in told
        )


def test_digits_are_split_as_the_model_learnt_them(tmp_path: Path) -> None:
    """transformers splits SmolLM2's text as GPT-2 does, which parts the last space from the others before a digit."""
    tokens = ["<u>", "<s>", "<e>", "<t>", *(chr(33 + i) for i in range(90)), "Ċ", "ĊĊ"]
    names = {"tokens": tokens, "merges": ["Ċ Ċ"]}
    for pre, expected in (("smollm", ["ĊĊ", "1", "2", "a"]), ("gpt-2", ["Ċ", "Ċ", "1", "2", "a"])):
        tokenizer = load(write(tmp_path / f"{pre}.gguf", pre=pre, **names)).tokenizer
        assert tokenizer.tokenize("\n\n12a") == expected


def test_a_split_outlasts_a_class_that_sets_its_own(tmp_path: Path) -> None:
    """AutoTokenizer takes GPT2Tokenizer for StarCoder2, which sets GPT-2's split when it is loaded."""
    tokens = {token: i for i, token in enumerate(["<u>", *(chr(33 + i) for i in range(90)), "Ċ", "ĊĊ"])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=tokens, merges=[("Ċ", "Ċ")]))
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "starcoder"}
    gguf_splits.save(transformers.GPT2Tokenizer(tokenizer_object=raw), fields, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "starcoder2"}))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).tokenize("\n\n12a") == ["ĊĊ", "1", "2", "a"]


REFUSED = {
    "an unknown architecture": (
        {"architecture": "mystery"},
        r"cannot read .*tiny\.gguf: .*mystery.* Set target\.model",
    ),
    "no tokenizer": ({"tokens": []}, r"tiny\.gguf holds no tokenizer\. Set target\.model"),
    "one part of several": ({"split": 3}, r"is one of 3 parts\. Join them with: llama-gguf-split --merge"),
    "a tensor without a place": (
        {"more": {"blk.1.attn_q_norm.weight": np.ones(8, np.float32)}},
        r"for which LlamaForCausalLM .* has no place \(1, the first: blk\.1\.attn_q_norm\.weight\)\. Set target\.model",
    ),
    "a missing tensor": ({"leave_out": "blk.1.ffn_up.weight"}, r"lacks 1 of its model's tensors, .*1\.mlp\.up_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_serve_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(TargetError, match=message) as caught:
        load(write(tmp_path / "tiny.gguf", **changes))
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (5, 20, 60, 300, 900, 2000, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:length])
        with pytest.raises(TargetError, match=r"cut\.gguf is damaged, or was cut off .* Fetch it again") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    for name, content in (("model.gguf", b"PK\x03\x04 a zip"), ("empty.gguf", b""), ("model.safetensors", b"\x10\0")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TargetError, match="is a file, and no GGUF. Set target.model"):
            load(tmp_path / name)
    with pytest.raises(TargetError, match=r"there is no file .*nowhere\.gguf\. Set target\.model"):
        load(tmp_path / "nowhere.gguf")
    assert gguf_file.find(str(embedded.FOLDER / "target"), "main") is None
    assert gguf_file.find("HuggingFaceTB/SmolLM2-135M-Instruct", "main") is None


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"needs the package gguf\. Run, in coral's folder: pip install '\.\[gguf\]'"):
        gguf_file.unpack(path, torch.float32)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(TargetError, match=r"cannot keep a dequantised GGUF .* HF_HOME"):
        gguf_file.unpack(path, torch.float32)
