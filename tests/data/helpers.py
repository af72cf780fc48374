"""A random two-layer chat model with a tokenizer of its own, and recipes for it."""

import datetime
import functools
import json
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from coral_core.data import plan
from coral_core.data.job import Job
from coral_core.data.stage import prepare
from coral_core.recipe.loader import load_recipe
from coral_core.target.load import wrap
from coral_core.target.target import Target

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TAGGED_NEVER = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
NOON = datetime.datetime(2026, 1, 1, 12)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(template: str = CHATML) -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and ChatML's special tokens: 259 in all."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=259, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[0], chat_template=template, name_or_path="tiny"
    )


@functools.cache
def make_target(template: str = CHATML, seed: int = 0, layers: int = 2) -> Target:
    """A random Llama in float32 that stops at any of 40 tokens, so that what it writes ends at all lengths."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = [2, *range(100, 140)]  # none of ASCII
    return wrap(model, make_tokenizer(template))


def make_job(folder: Path, target: Target | None = None, **data: Any) -> Job:
    """A small job; the folder is RUN/data."""
    keys = {"max_samples": 16, "holdout": 3, "max_length": 120, "max_new_tokens": 12, "batch_size": 4}
    keys |= {"regenerate": "sample", **data}
    seed = keys.pop("seed", 0)
    shape = keys.pop("shape", "eagle2")
    overrides = [f"seed={seed}", f"train.shape={shape}", *(f"data.{key}={value}" for key, value in keys.items())]
    return Job(load_recipe(None, overrides), target or make_target(), folder / "data")


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store; but the commit that made it is left out of its manifest."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = json.loads(files["manifest.json"]) | {"git_commit": "", "sha256": ""}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def prepare_telling(folder: Path, connection: Connection) -> None:
    """`prepare` of `make_job`'s defaults on one thread, each report of progress sent as its stage's name."""
    torch.set_num_threads(1)
    plan.SHARD_TOKENS = 200
    prepare(make_job(folder), lambda stage, *_: connection.send(stage))
