"""Run by an interpreter that has vLLM: its own config classes and weight loader read an exported folder, on a CPU.

Argument: a JSON list of [TARGET, FOLDER, METHOD, GIVEN, MADE]. Two steps are drafted from what GIVEN holds (token ids,
features or taps), and what the LM head reads after each goes to MADE. vLLM's attention looks at its cache, with kernels
that a wheel for GPUs has for GPUs only: torch's stands in for it, and each other layer runs the form that vLLM wrote in
torch.
Prints one JSON line: the version, and of each folder the class and the architecture that vLLM chose, and every
parameter's shape and sum.
"""

import json
import os
import sys
import tempfile

import torch
from causal import stand_in
from safetensors.torch import load_file, save_file

os.environ["VLLM_TARGET_DEVICE"] = "cpu"


def drafted(model, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the LM head reads after each of two steps, and of EAGLE-3's shape its logits over the target's words."""
    stand_in(model)
    wide = hasattr(model, "combine_hidden_states")
    state_TD = model.combine_hidden_states(given["read"]) if wide else given["read"]
    positions_T, made = torch.arange(len(state_TD)), {}
    for step in range(2):
        hidden_TD, state_TD = model(given["ids"], positions_T, state_TD)
        made[f"hidden {step}"] = hidden_TD
        if wide:
            made[f"logits {step}"] = model.compute_logits(hidden_TD)
    return {name: value.contiguous() for name, value in made.items()}


def load(target: str, folder: str, method: str, given: str, made: str) -> dict[str, object]:
    """One folder: what vLLM made of it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    speculative = {"method": method, "model": folder, "num_speculative_tokens": 3, "draft_tensor_parallel_size": 1}
    args = EngineArgs(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        speculative_config=speculative,
    )
    config = args.create_engine_config()
    draft = config.speculative_config.draft_model_config
    with set_current_vllm_config(config):
        begin()
        model = get_model(vllm_config=config, model_config=draft)
        save_file(drafted(model, load_file(given)), made)
    return {
        "class": type(model).__name__,
        "config": type(draft.hf_config).__name__,
        "architectures": draft.hf_config.architectures,
        "parameters": {
            name: [list(value.shape), value.double().sum().item()] for name, value in model.named_parameters()
        },
    }


def begin() -> None:
    """A group of one process, once."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if not torch.distributed.is_initialized():
        torch.accelerator.empty_cache = lambda: (
            None
        )  # called once all is loaded; the wheel for GPUs finds none to empty
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/group", 0, "gloo")
        initialize_model_parallel()


@torch.no_grad()
def main(jobs: str) -> None:
    import vllm

    found = [load(*job) for job in json.loads(jobs)]
    sys.stdout.write(json.dumps({"version": vllm.__version__, "found": found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
