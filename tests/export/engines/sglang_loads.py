"""Run by an interpreter that has SGLang: its own class and weight loader read an exported folder, on a CPU.

The wheel's kernels are for a GPU, and reading weights needs none of them: a package that is not there is stood in for.
Prints one JSON line: the version, the class that SGLang chose, and every parameter's shape and sum.
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


def main(folder: str) -> None:
    import transformers.utils

    transformers.utils.is_torchvision_available()  # remembered, before it seems to be there
    sys.meta_path.insert(0, Finder([name for name in STOOD_IN_FOR if importlib.util.find_spec(name) is None]))
    import sglang
    import torch
    from safetensors.torch import load_file
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.speculative.spec_utils import load_token_map
    from sglang.test.layer_ut_utils import init_single_process_dist

    config = transformers.AutoConfig.from_pretrained(folder)
    init_single_process_dist()
    kind, _ = ModelRegistry.resolve_model_cls(config.architectures)
    torch.manual_seed(0)
    model = kind(config).float()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # what the loader leaves alone shows
    model.load_weights(load_file(Path(folder) / "model.safetensors").items())
    found = {
        "version": sglang.__version__,
        "class": type(model).__name__,
        "parameters": {
            name: [list(value.shape), value.double().sum().item()] for name, value in model.named_parameters()
        },
        "token_map": [int(token) for token in load_token_map(str(Path(folder) / "token_map.pt"))],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
