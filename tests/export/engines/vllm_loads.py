"""Run by an interpreter that has vLLM: its own config classes and weight loader read an exported folder, on a CPU.

Prints one JSON line: the version, the class and the architecture that vLLM chose, and every parameter's shape and sum.
"""

import json
import os
import sys
import tempfile

os.environ["VLLM_TARGET_DEVICE"] = "cpu"


def main(target: str, folder: str) -> None:
    import torch
    import vllm
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    torch.accelerator.empty_cache = lambda: None  # called once all is loaded; the wheel for GPUs finds none to empty
    speculative = {"method": "eagle", "model": folder, "num_speculative_tokens": 3, "draft_tensor_parallel_size": 1}
    args = EngineArgs(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        skip_tokenizer_init=True,
        speculative_config=speculative,
    )
    config = args.create_engine_config()
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as file:
        init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
        initialize_model_parallel()
        draft = config.speculative_config.draft_model_config
        model = get_model(vllm_config=config, model_config=draft)
    found = {
        "version": vllm.__version__,
        "class": type(model).__name__,
        "config": type(draft.hf_config).__name__,
        "architectures": draft.hf_config.architectures,
        "parameters": {
            name: [list(value.shape), value.double().sum().item()] for name, value in model.named_parameters()
        },
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
