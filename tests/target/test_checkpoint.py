"""What is refused of a target's files, each in one line that names the file or weight; and what is harmless."""

import dataclasses
import json
import shlex
import shutil
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from coral_core import embedded, hub
from coral_core.decoding.engine import plain
from coral_core.decoding.sampling import Sampler
from coral_core.errors import CoralWarning, TargetError
from coral_core.recipe.schema import TargetSpec
from coral_core.target import checkpoint
from coral_core.target.checkpoint import reachable
from coral_core.target.load import load_target
from coral_core.target.target import Target
from tests.decoding.test_lossless import ids_of
from tests.tiny import SHAPE, tiny_engine

Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random model of four layers, with pico's tokenizer."""
    return make(tmp_path / "model")


def make(folder: Path, **changes: object) -> Path:
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 4096, "num_hidden_layers": 4, **changes})
    return save(transformers.AutoModelForCausalLM.from_config(config), folder)


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.FOLDER / "target" / name, folder)
    return folder


def load(folder: Path) -> Target:
    return load_target(TargetSpec(model=str(folder)))


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit(folder: Path, how: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path) -> str:
    """The message, which is one line."""
    with pytest.raises(TargetError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_layers_that_the_files_lack_are_not_made_up(folder: Path) -> None:
    change(folder, num_hidden_layers=6)
    assert "its files lack 18 weights (the first: model.layers.4.input_layernorm.weight)" in refused(folder)


def test_a_head_that_the_files_lack_is_not_made_up(folder: Path) -> None:
    edit(folder, lambda weights: weights.pop("lm_head.weight"))
    assert "its files lack lm_head.weight" in refused(folder)


def test_layers_that_the_config_leaves_out_are_not_dropped(folder: Path) -> None:
    change(folder, num_hidden_layers=3)
    message = refused(folder)
    assert "its files hold 9 weights (the first: model.layers.3.input_layernorm.weight)" in message
    assert "config.json has no place" in message


def test_a_layer_that_predicts_further_tokens_is_left_out(folder: Path) -> None:
    """DeepSeek-V3's layer 61, GLM-4.5's layer 92: behind those of the config, as many as it names."""
    change(folder, num_hidden_layers=3, num_nextn_predict_layers=1)
    assert load(folder).model.config.num_hidden_layers == 3
    change(folder, num_hidden_layers=2)
    assert "its files hold 9 weights (the first: model.layers.3.input_layernorm.weight)" in refused(folder)


def test_a_bias_that_the_config_leaves_out_is_not_dropped(folder: Path) -> None:
    edit(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert "its files hold model.layers.0.self_attn.q_proj.bias" in refused(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    change(folder, intermediate_size=64)
    message = refused(folder)
    assert "model.layers.0.mlp.down_proj.weight has the shape [32, 48], and config.json says [32, 64]" in message


@pytest.mark.parametrize("left", [0, 5, 3000])
def test_a_truncated_file_is_named_with_its_size(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert f"{path} ({left:,} bytes) is truncated or damaged" in refused(folder)


def test_a_shard_that_the_index_names_and_that_is_absent(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    absent = sorted(folder.glob("*.safetensors"))[1]
    absent.unlink()
    assert absent.name in refused(folder)


def test_a_pointer_of_git_lfs_is_told_from_weights(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    assert f"model.safetensors is a pointer of Git LFS, not the file itself. Run: git -C {folder}" in refused(folder)


def test_pickled_weights_come_with_a_command_that_converts_them(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = refused(folder).rpartition("convert it with: ")[2]
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(code)  # what a user is told to run
    assert load(folder).max_positions == SHAPE["max_position_embeddings"]


def test_weights_that_are_not_numbers(folder: Path) -> None:
    edit(folder, lambda weights: weights["model.layers.0.mlp.down_proj.weight"].fill_(float("nan")))
    assert "answers with numbers that are infinite or none in torch.float32" in refused(folder)


def test_a_config_that_means_nothing(folder: Path) -> None:
    change(folder, hidden_size="x")
    assert "Validation error for field 'hidden_size': TypeError" in refused(folder)
    change(folder, hidden_size=32, num_attention_heads=0)
    assert "cannot load target" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json' is not a valid JSON file" in refused(folder)
    (folder / "config.json").unlink()
    assert "holds no config.json" in refused(folder)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_lora_adapter_is_to_be_merged(folder: Path, weights: str) -> None:
    """It said that the folder holds no config.json, and of a .bin that it is pickled."""
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / weights)
    (folder / "adapter_config.json").write_text("{}")
    message = refused(folder)
    assert f"{folder} holds a LoRA adapter alone (adapter_config.json). Merge it" in message
    assert "merge_and_unload(), write model and tokenizer with save_pretrained()" in message


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError])
def test_a_private_or_gated_model_names_the_login(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers names it in its message's second line, which is cut."""
    response = SimpleNamespace(status_code=401, headers={}, request=None)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMore.") from kind("401", response=response)

    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(TargetError, match=r"If it is private or gated, .* run: hf auth login$"):
        load_target(TargetSpec(model="org/model"))


def test_a_tokenizer_that_is_absent_or_damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert "has no tokenizer that loads: " in refused(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert f"has no tokenizer that loads: {folder} holds none. Copy tokenizer.json" in refused(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_harmless_is_taken(tmp_path: Path, tied: bool) -> None:
    """A head that is tied, and so in no file; parts of their own; buffers that old checkpoints hold."""
    folder = make(tmp_path / "model", tie_word_embeddings=tied)
    more = {
        "value_head.weight": 4,
        "model.vision_tower.patch.weight": 4,
        "model.layers.0.self_attn.rotary_emb.inv_freq": 4,
    }
    edit(folder, lambda weights: weights.update({key: torch.ones(size) for key, size in more.items()}))
    assert load(folder).lent.head_VD.shape == (4096, 32)


def test_the_text_of_a_model_that_also_reads_images_is_decoded(tmp_path: Path) -> None:
    """Mistral Small 3.1 and its like are in no list of causal models; drafts change nothing there, and taps are had."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **SHAPE, "num_hidden_layers": 4},
        vision_config={"model_type": "pixtral", **size, "image_size": 28, "patch_size": 14},
        image_token_index=95,
    )
    torch.manual_seed(0)
    target = load(save(transformers.AutoModelForImageTextToText.from_config(config), tmp_path / "model"))
    target = dataclasses.replace(target, stop_ids=frozenset())
    assert target.tapping((1, 2, 3)).forward(torch.tensor([[3, 4, 5]])).shape == (1, 3, 4 * 32)
    prompt = [5, 6, 7, 8]
    ids = ids_of(list(plain(target, prompt, Sampler(), 12)))
    target.model.generation_config.eos_token_id = None
    own_BT = target.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert ids == own_BT[0, 4:].tolist()
    assert ids_of(list(tiny_engine(target).decode(prompt, Sampler(), 12))) == ids


def test_what_quantised_files_hold_for_nobody_is_left_out_and_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoGPTQ's biases, which are zeros, and the scales of an 8-bit cache; a whole layer is none of these."""
    part = "model.layers.0.self_attn"
    more = {key: torch.zeros(1) for key in (f"{part}.q_proj.bias", f"{part}.k_scale", f"{part}.v_proj.v_scale")}
    edit(folder, lambda weights: weights.update(more))
    read = checkpoint._spare

    def quantised(model: transformers.PreTrainedModel, info: dict[str, object]) -> list[str]:
        """Its quantiser would need a package."""
        model.config.quantization_config = {"quant_method": "gptq"}
        return read(model, info)

    assert "its files hold 3 weights" in refused(folder)
    monkeypatch.setattr(checkpoint, "_spare", quantised)
    with pytest.warns(CoralWarning, match=rf"is quantised, and its files hold 3 weights \(the first: {part}\.k_scale"):
        load(folder)
    edit(folder, lambda weights: weights.update({"model.layers.0.mlp.more.weight": torch.ones(2)}))
    assert "its files hold model.layers.0.mlp.more.weight, for which" in refused(folder)


def tokenizer_of(folder: Path, vocabulary: list[str], pre_tokenizer: object) -> transformers.PreTrainedTokenizerFast:
    """As `load_tokenizer` reads what a tokenizer of these tokens was saved as, beside a config of Mistral's."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({token: place for place, token in enumerate(vocabulary)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    config = transformers.MistralConfig()
    config.save_pretrained(folder)
    change(folder, transformers_version="4.57.0")
    return checkpoint.load_tokenizer("mine", str(folder), config, {})


ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    """Early transformers 5 gave DeepSeek's distilled models Llama's marks of a space, which are no tokens there."""
    marks = tokenizers.pre_tokenizers.Metaspace()
    with pytest.raises(
        TargetError, match=r"of target 'mine' loses the spaces between words in transformers .* Run: pip"
    ):
        tokenizer_of(tmp_path / "lost", ALPHABET, marks)
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer_of(tmp_path / "kept", ALPHABET, bytes_)
    tokenizer_of(tmp_path / "letters", list("abcdefghijklmnopqrstuvwxyz0123456789"), bytes_)  # it has no space to lose


@pytest.mark.parametrize("tekken", [True, False])
def test_mistrals_tekken_is_split_as_the_model_learnt_it(
    tmp_path: Path, tekken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its published tokenizer.json takes three digits for one word. Others' models of its type stay as they are."""
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    split = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(words, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary = [*ALPHABET, "[TOOL_CALLS]" if tekken else "[OTHER]", *(f"<{number}>" for number in range(100_001))]
    read, asked = transformers.AutoTokenizer.from_pretrained, []

    def noted(*given: object, **options: object) -> object:
        asked.append(options)
        return read(*given, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", noted)
    tokenizer = tokenizer_of(tmp_path, vocabulary, split)
    found = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")]
    assert found == (["a", "Ġ", "1", "2", "3"] if tekken else ["a", "Ġ", "123"])
    assert all("fix_mistral_regex" in options for options in asked), "else mistral-common's is taken, where it is"


def test_a_folder_that_is_not_there() -> None:
    for name in ("./nosuchdir", "/no/such/dir", "~/nosuchdir", "a/b/c", "../x"):
        with pytest.raises(TargetError, match=f"there is no folder '{name}'"):
            load_target(TargetSpec(model=name))


def test_the_hub_is_asked_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and never listening: a connection is refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert not hub.answers()
        with hub.offline_where_absent():
            assert constants.HF_HUB_OFFLINE
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.answers() and hub.unreachable() == "HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("status", [200, 404])
def test_a_hub_that_answers_is_there_whatever_it_says(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert hub.answers()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the Hub's client tries each of several files six times, for half a minute each."""
    asked = []

    def absent() -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(hub, "answers", absent)
    with pytest.raises(TargetError, match=r"cannot load target 'owner/name': .*its cache does not hold the model"):
        load_target(TargetSpec(model="owner/name"))
    assert len(asked) <= 2
    assert reachable("owner/name", "owner/name", {}) == {"local_files_only": True}, "its client asks no server"


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_checkpoint_is_trusted_as_the_recipe_says(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def noted(load: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            seen.append(bool(given[-1]["trust_remote_code"]))
            return load(*given)

        return noting

    for part in ("load_config", "load_tokenizer", "load_model"):
        monkeypatch.setattr(checkpoint, part, noted(getattr(checkpoint, part)))
    load_target(TargetSpec(trust_remote_code=trusted))
    assert seen == [trusted] * 3
