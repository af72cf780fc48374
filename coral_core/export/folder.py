"""Writing an engine's folder, and reading it back before it gets its name.

Axes: V vocabulary, D hidden.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open

from coral_core.drafter.checkpoint import EMBED, FC_BIAS, read_checkpoint
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.eagle3 import flat
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.export.bring_in import lent_head
from coral_core.export.layouts import Layout, config_values, narrow
from coral_core.export.wide import WIDE, layer_name, wide_tensors, wide_values
from coral_core.lent import Lent
from coral_core.tensors import write_tensors

WEIGHTS = "model.safetensors"


def write_folder(layout: Layout, drafter: Drafter, lent: Lent, folder: Path, target: str) -> None:
    """config.json and model.safetensors as the engine reads them: the drafter's own bits, none rounded.

    The embedding goes along: vLLM shares the target's when the two are equal, and with pipeline parallelism the
    drafter's stays random without it. Raises ArtifactError when what was written is not what the engine expects.
    """
    scale, dtype = lent.logit_scale, str(drafter.fc.weight.dtype).removeprefix("torch.")
    if drafter.config.taps:
        weights = wide_tensors(layout, drafter, lent)
        config = wide_values(layout, drafter.config, dtype=dtype, logit_scale=scale, target=target)
    else:
        weights = _tensors(layout, drafter)
        config = config_values(layout, drafter.config, dtype=dtype, logit_scale=scale)
    weights[EMBED] = narrow(lent.embed_VD)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(weights, folder / WEIGHTS, {"format": "pt"})
    check_folder(layout, drafter.config, folder)
    _check_bits(drafter, lent, folder)


def _tensors(layout: Layout, drafter: Drafter) -> dict[str, torch.Tensor]:
    """Every tensor of a folder of EAGLE-2's shape but the embedding."""
    weights = {name: value.detach().cpu().contiguous() for name, value in drafter.state_dict().items()}
    bias_D = weights.pop(FC_BIAS, None)
    if _with_bias(layout, drafter.config):
        weights[FC_BIAS] = weights["fc.weight"].new_zeros(drafter.config.hidden_size) if bias_D is None else bias_D
    return weights


def _with_bias(layout: Layout, config: DrafterConfig) -> bool:
    """Whether the folder's `fc` has a bias."""
    return layout.fc_bias == "always" or (layout.fc_bias == "as is" and config.fc_bias)


def expected_shapes(layout: Layout, config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the folder, as the engine's loader asks for them."""
    embedding = (config.vocab_size, config.hidden_size)
    with torch.device("meta"):
        drafter = Drafter(dataclasses.replace(config, fc_bias=_with_bias(layout, config)))
    shapes = {name: tuple(value.shape) for name, value in drafter.state_dict().items()} | {EMBED: embedding}
    if not config.taps:
        return shapes
    if config.draft_vocab_size:
        shapes["t2d"] = (config.vocab_size,)
    elif layout is not WIDE["sglang"]:
        shapes["lm_head.weight"] = embedding
    return {layer_name(layout, name): shape for name, shape in shapes.items()}


def check_folder(layout: Layout, config: DrafterConfig, folder: Path) -> None:
    """Raises ArtifactError naming the first tensor or config key that the engine's loader would refuse or miss."""
    expected = expected_shapes(layout, config)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ArtifactError(
                f"{folder / WEIGHTS}: tensor '{name}' is {found.get(name, 'missing')}, and {layout.engine} expects "
                f"{expected.get(name, 'none of that name')}. Run: coral export"
            )
    path = folder / "config.json"
    values = flat(path, json.loads(path.read_text(encoding="utf-8")))
    wanted = {"architectures": [layout.architecture], "num_hidden_layers": 1, "attention_bias": False}
    wanted |= {"tie_word_embeddings": False, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    for key, value in wanted.items():
        if values.get(key) != value:
            raise ArtifactError(
                f"{folder / 'config.json'}: {key} is {values.get(key)}, and {layout.engine} expects {value}. "
                "Run: coral export"
            )


def _check_bits(drafter: Drafter, lent: Lent, folder: Path) -> None:
    """What is read back is the drafter, bit for bit, in a config that transformers reads as the drafter's own."""
    back = read_checkpoint(folder)
    own, read = drafter.state_dict(), lent_head(back.drafter, lent).state_dict()
    same = own.keys() >= read.keys() and all(torch.equal(value, own[name].cpu()) for name, value in read.items())
    embed_VD = back.embed_VD
    assert embed_VD is not None and torch.equal(embed_VD.to(lent.embed_VD.dtype), lent.embed_VD.cpu()), "embedding"
    assert same and back.drafter.rope.scaling == drafter.rope.scaling, "weights"
    assert torch.equal(back.drafter.rope.inv_freq_E, drafter.rope.inv_freq_E.cpu()), "RoPE"
