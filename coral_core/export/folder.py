"""Writing an engine's folder, and reading it back before it gets its name.

Axes: V vocabulary, D hidden.
"""

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
from coral_core.export.layouts import Layout, config_values, narrow, tensor_shapes
from coral_core.export.wide import wide_shapes, wide_tensors, wide_values
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
    shapes = tensor_shapes(layout, drafter.config)
    if FC_BIAS in shapes and FC_BIAS not in weights:
        weights[FC_BIAS] = torch.zeros(shapes[FC_BIAS], dtype=drafter.fc.weight.dtype)
    if FC_BIAS not in shapes:
        weights.pop(FC_BIAS, None)
    return weights


def check_folder(layout: Layout, config: DrafterConfig, folder: Path) -> None:
    """Raises ArtifactError naming the first tensor or config key that the engine's loader would refuse or miss."""
    expected = wide_shapes(layout, config) if config.taps else tensor_shapes(layout, config)
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
