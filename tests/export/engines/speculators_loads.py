"""Run by an interpreter that has speculators: its own class reads an exported folder, and unrolls three steps.

Argument: a JSON list of [FOLDER, GIVEN, MADE]. GIVEN holds token ids and taps; what the LM head reads in each step goes
to MADE. Prints one JSON line: the version, and of each folder the class, and the shape and sum of every parameter and
buffer that is kept.
"""

import importlib.metadata
import json
import sys

import torch
from safetensors.torch import load_file, save_file


def load(folder: str, given: str, made: str) -> dict[str, object]:
    """One folder: what speculators made of it."""
    from speculators import Eagle3SpeculatorConfig, SpeculatorModel

    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"  # its own is compiled for a GPU
    model = SpeculatorModel.from_pretrained(folder, config=config).float().eval()
    hidden: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda module, given, out: hidden.append(out[0]))
    tensors = load_file(given)
    ids_1T = tensors["ids"][None]
    model(tensors["read"][None], ids_1T, torch.zeros_like(ids_1T), ttt_steps=3)
    save_file({f"hidden {step}": hidden_TD.contiguous() for step, hidden_TD in enumerate(hidden)}, made)
    return {
        "class": type(model).__name__,
        "layers": model.target_layer_ids,
        "parameters": {
            name: [list(value.shape), value.double().sum().item()] for name, value in model.state_dict().items()
        },
    }


@torch.no_grad()
def main(jobs: str) -> None:
    found = [load(*job) for job in json.loads(jobs)]
    sys.stdout.write(json.dumps({"version": importlib.metadata.version("speculators"), "found": found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
