"""Every shipped recipe starts: it loads strictly, and its drafter has the size we say, built without memory."""

from pathlib import Path

import pytest
import torch
import transformers

from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.recipe.loader import load_recipe, to_mapping
from coral_core.recipe.schema import Recipe
from coral_core.target.load import drafter_shape

RECIPES = Path(__file__).parent.parent.parent / "recipes"

LLAMA_2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA_3 = LLAMA_2 | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
QWEN_2_5 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
SMOLLM2 = LLAMA_2 | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
QWEN_CODER = QWEN_2_5 | {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
PICO = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}

# What each model's own config.json says, and the drafter's parameters. EAGLE-2's shape: fc 2D·D, q and o D·D each, k
# and v D·(kv heads·head size) each, gate, up and down D·I each, one norm D. EAGLE-3.1's: fc 3D·D, q, k and v of 2D
# inputs, six more norms D. The embedding and the LM head are the target's.
TARGETS = {
    "pico": ("pico", PICO, 131_072 + 2 * 65_536 + 2 * 32_768 + 3 * 180_224 + 256),
    "demo": ("pico", PICO, 868_608),
    "llama-3-8b-instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", LLAMA_3, 293_629_952),
    "llama-2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", LLAMA_2, 303_067_136),
    "qwen2.5-7b-instruct": ("Qwen/Qwen2.5-7B-Instruct", QWEN_2_5, 288_121_344),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2, 5_091_264),
    "qwen2.5-coder-0.5b": ("Qwen/Qwen2.5-Coder-0.5B-Instruct", QWEN_CODER, 18_356_352),
    "vicuna-7b": ("lmsys/vicuna-7b-v1.5", LLAMA_2, 303_067_136),
}


SHAPES: dict[str, dict] = {"eagle2": {}, "eagle3.1": {"taps": (1, 2, 3), "norm_output": True, "fc_norm": True}}


def test_every_recipe_is_in_the_table():
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_shipped_recipe_builds_a_drafter_of_the_right_size(name):
    model, values, parameters = TARGETS[name]
    recipe = load_recipe(RECIPES / f"{name}.yaml", [])
    assert (recipe.name, recipe.target.model) == (name, model)
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        drafter = Drafter(DrafterConfig(**drafter_shape(config), **SHAPES[recipe.train.shape]))
    assert sum(weight.numel() for weight in drafter.parameters()) == parameters
    assert drafter.rope.inv_freq_E.shape == (config.hidden_size // config.num_attention_heads // 2,)
    assert config.vocab_size % recipe.head.groups == 0, "the recipe's comment promises groups of equal size"
    assert recipe.data.max_length + recipe.decode.max_new_tokens <= config.max_position_embeddings


def test_pico_yaml_writes_every_key():
    """It is the documentation of every key: a key added to the schema is added there, with a comment."""
    text = (RECIPES / "pico.yaml").read_text(encoding="utf-8")
    for key, value in to_mapping(Recipe()).items():
        for name in value if isinstance(value, dict) else [key]:
            assert f"{name}:" in text


def test_the_recipe_stays_small():
    """A budget of 60 keys, so that each one is a decision: CSRA's open choices are two, sampling's processors five, a
    server's address one, features on disk or not one, whether the tree is chosen by its cost one,
    whether forwards are recorded one, the rows of the loss one, how passes grow one, whether forwards are exact one,
    the chat template of a model without one one.
    """
    mapping = to_mapping(Recipe())
    assert sum(len(value) if isinstance(value, dict) else 1 for value in mapping.values()) <= 60
