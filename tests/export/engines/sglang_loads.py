"""Run by an interpreter that has SGLang: its own class and weight loader read an exported folder, on a CPU.

Argument: a JSON list of [FOLDER, GIVEN, MADE]. Two steps are drafted from what GIVEN holds (token ids, features or
taps), and what the LM head reads after each goes to MADE. The wheel's kernels are for a GPU: a package that is not
there is stood in for, torch's attention is used, and each other layer runs the form that SGLang wrote in torch.
Prints one JSON line: the version, and of each folder the class that SGLang chose, and every parameter's shape and sum.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from causal import stand_in
from safetensors.torch import load_file, save_file

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
STOOD_IN_FOR = ("sgl_kernel", "torchvision")


class Absent(types.ModuleType):
    """A module whose every name is a mock."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent, submodules too."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path, target=None):
        known = name.split(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        """Nothing to run."""


def drafted(model, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the LM head reads after each of two steps."""
    stand_in(model)
    state_TI, made = given["read"], {}
    for step in range(2):
        forward = mock.MagicMock(mm_input_embeds=None)
        forward.spec_info.hidden_states = state_TI
        out = model.model(given["ids"], torch.arange(len(state_TI)), forward)
        made[f"hidden {step}"], state_TI = (out[0], out[1][0]) if isinstance(out, tuple) else (out, out)
    return {name: value.contiguous() for name, value in made.items()}


def load(folder: str, given: str, made: str) -> dict[str, object]:
    """One folder: what SGLang made of it."""
    import transformers
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.speculative.spec_utils import load_token_map

    config = transformers.AutoConfig.from_pretrained(folder)
    kind, _ = ModelRegistry.resolve_model_cls(config.architectures)
    torch.manual_seed(0)
    model = kind(config).float()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # what the loader leaves alone shows
    model.load_weights(load_file(Path(folder) / "model.safetensors").items())
    save_file(drafted(model, load_file(given)), made)
    token_map = Path(folder) / "token_map.pt"
    hot = load_token_map(str(token_map)) if token_map.exists() else getattr(model, "hot_token_id", None)
    return {
        "class": type(model).__name__,
        "parameters": {
            name: [list(value.shape), value.double().sum().item()] for name, value in model.named_parameters()
        },
        "token_map": hot if hot is None else [int(token) for token in hot],
    }


@torch.no_grad()
def main(jobs: str) -> None:
    import transformers.utils

    transformers.utils.is_torchvision_available()  # remembered, before it seems to be there
    sys.meta_path.insert(0, Finder([name for name in STOOD_IN_FOR if importlib.util.find_spec(name) is None]))
    import sglang
    from sglang.test.layer_ut_utils import init_single_process_dist

    init_single_process_dist()
    found = [load(*job) for job in json.loads(jobs)]
    sys.stdout.write(json.dumps({"version": sglang.__version__, "found": found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
