"""Training's speed and peak memory at three lengths, against the eager reference: ratios of one run on one machine.

    python -m benchmarks.train                  # [RECIPE.YAML] [section.key=value ...]: the target gives the shape

One optimizer step of CORAL (three unroll steps, every loss) on one dialogue of T tokens, nearly all of them an answer,
so that nothing is saved by leaving rows out. The eager reference computes the same loss with all T x T scores and all
[T,V] logits under autograd. Each variant runs in a process of its own: a process's peak memory never falls.

Then the shapes of two real targets, with vocabularies of 49,152 and 151,936: one step on two dialogues of 256 tokens,
with the loss over the whole vocabulary in float32, over the candidates of the preset `quick`, and these in bfloat16,
and the seconds of each part of it. The three take turns in one process, and the least of the steps counts; their peak
memory is measured in a process each.

On a GPU more rows follow: a drafter of an 8B target's shape in bfloat16, with the share of the dense peak it reaches.

Axes: B batch, T position, N row that carries a loss, S unroll step, D hidden, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import busy_s
from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.lent import Lent
from coral_core.recipe.schema import PRESETS, UNSET, Recipe, TrainSpec
from coral_core.store.batches import Batch
from coral_core.target.load import drafter_shape, load_target
from coral_core.training import losses
from coral_core.training.alignment import csra, take_rows
from coral_core.training.candidates import DRAWN, Candidates, HeadRows
from coral_core.training.loop import CLIP_NORM
from coral_core.training.objective import Objective, pack
from coral_core.training.trainer import make_objective
from coral_core.training.unroll import Unroll, loss_rows, unroll_rows
from tests.training.reference import attend_eager, distill, topk

LENGTHS = (512, 2048, 8192)
PROMPT = 8
SPEC = TrainSpec(**{"preset": "coral", **UNSET, **PRESETS["coral"]})  # type: ignore[arg-type]
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMOLLM2_135M = LLAMA_3_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}
QWEN2_5_05B = LLAMA_3_8B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 151936,
}
VOCABULARIES = {"SmolLM2-135M": SMOLLM2_135M, "Qwen2.5-0.5B": QWEN2_5_05B}
TURNS = 2
"""Steps of each form of the loss, after a short one that is not timed."""
DENSE_BF16_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""FLOP/s of NVIDIA's data sheets, without sparsity, by a part of the device's name."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One variant, as it is handed to its process."""

    variant: str
    length: int
    config: dict[str, Any]
    precision: str = "float32"
    batch_size: int = 1
    budget_s: float = 20.0
    candidates: int = 0

    def run(self) -> dict[str, Any]:
        """Train for `budget_s` seconds, at least one step, and measure."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lent = random_lent(self.config, device, getattr(torch, self.precision))
        model = Unroll(Drafter(DrafterConfig(**self.config)).to(device), SPEC.unroll_steps)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        batch = random_batch(self.config, self.batch_size, self.length, device)
        chosen = some_candidates(self.candidates, device)

        def step(batch: Batch) -> None:
            mixed = self.precision != "float32"
            with torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = LOSSES[self.variant](model, lent, batch, chosen)
            (loss / loss_rows(batch).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()

        step(random_batch(self.config, 1, 2 * PROMPT, device))  # loads libraries, makes AdamW's state
        flops = _flops(step, batch) if device.type == "cuda" else None
        before_bytes = _begin_peak(device)
        begun_s, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - begun_s < self.budget_s:
            step(batch)
            steps += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        step_s = (time.perf_counter() - begun_s) / steps
        tokens_per_s = self.batch_size * self.length / step_s
        found = {"tokens_per_s": tokens_per_s, "peak_bytes": _peak_bytes(device) - before_bytes, "steps": steps}
        return found | _share_of_peak(flops, step_s)


def fast(model: Unroll, lent: Lent, batch: Batch, chosen: Candidates | None = None) -> torch.Tensor:
    """The loss as `coral train` computes it."""
    return make_objective(SPEC, chosen)(model(lent, batch), batch, lent)[0]


def eager(model: Unroll, lent: Lent, batch: Batch, _: Candidates | None = None) -> torch.Tensor:
    """The same number from the references, over the whole vocabulary."""
    embed_BTD, feature_BTD = lent.embed(batch.ids_BT[:, 1:]), batch.feature_BTD[:, :-1]
    rows = [batch.valid_BT[:, 1:]] * model.steps
    hiddens = unroll_rows(model.drafter, (embed_BTD.to(feature_BTD.dtype), feature_BTD), rows, attend_eager)
    row_BN, present_BN = pack(loss_rows(batch))
    hidden_SBND = torch.stack([take_rows(hidden_BTD, row_BN) for hidden_BTD in hiddens])
    feature_BND = take_rows(batch.feature_BTD[:, 1:], row_BN)
    feature_ND, total = feature_BND[present_BN], torch.zeros((), device=feature_BND.device)
    for hidden_ND in hidden_SBND[:, present_BN]:
        total = total + SPEC.regression_weight * losses.regression(hidden_ND, feature_ND)
        total = total + SPEC.distill_weight * distill(hidden_ND, feature_ND, lent)
        total = total + SPEC.topk_weight * topk(hidden_ND, feature_ND, lent, make_objective(SPEC).topk)
    total = total + SPEC.csra_weight * csra(hidden_SBND, present_BN, SPEC.csra_temperature)
    return total / model.steps


LOSSES = {"fast": fast, "eager": eager}


def some_candidates(count: int, device: torch.device) -> Candidates | None:
    """The first tokens are the frequent ones; 0: the whole vocabulary."""
    return Candidates(torch.arange(count - count // DRAWN, device=device), count // DRAWN) if count else None


def random_lent(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Lent:
    """An untied embedding and head of the shape."""
    size = (config["vocab_size"], config["hidden_size"])
    return Lent(*(torch.randn(size, device=device, dtype=dtype) / size[1] ** 0.5 for _ in range(2)))


def random_batch(config: dict[str, Any], batch_size: int, length: int, device: torch.device) -> Batch:
    """Dialogues of `length` tokens whose first few are the prompt."""
    shape = (batch_size, length)
    return Batch(
        ids_BT=torch.randint(config["vocab_size"], shape, device=device),
        answer_BT=(torch.arange(length, device=device) >= PROMPT).expand(shape),
        valid_BT=torch.ones(shape, dtype=torch.bool, device=device),
        feature_BTD=torch.randn(*shape, config["hidden_size"], device=device),
    )


def _begin_peak(device: torch.device) -> int:
    """Forget the peak so far; the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _flops(step: Any, batch: Batch) -> int:
    """Floating-point operations of the products in one step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(batch)
    return int(counter.get_total_flops())


def _share_of_peak(flops: int | None, step_s: float) -> dict[str, Any]:
    if flops is None:
        return {}
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in DENSE_BF16_FLOPS.items() if part in name), None)
    return {"flops": flops, "share_of_dense_bf16_peak": peak and flops / step_s / peak}


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a step, ready to run."""

    model: Unroll
    lent: Lent
    objective: Objective
    optimizer: torch.optim.Optimizer
    precision: torch.dtype

    @classmethod
    def make(cls, config: dict[str, Any], candidates: int, precision: torch.dtype) -> "Form":
        """A drafter of the shape, and the loss over so many candidates; 0: over the whole vocabulary."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Unroll(Drafter(DrafterConfig(**config)).to(device), SPEC.unroll_steps)
        objective = make_objective(SPEC, some_candidates(candidates, device))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        return cls(model, random_lent(config, device, precision), objective, optimizer, precision)

    def step(self, batch: Batch) -> dict[str, float]:
        """Seconds of each part of one step; `vocabulary` and `alignment` are within `loss`, and measured beside it."""
        clock = Clock()
        mixed = self.precision != torch.float32
        with torch.autocast(batch.ids_BT.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            hiddens = clock.lap("unroll", self.model(self.lent, batch))
            loss, _ = clock.lap("loss", self.objective(hiddens, batch, self.lent))
            clock.lap("backward", (loss / loss_rows(batch).sum()).backward())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            clock.lap("update", self.optimizer.step())
            self.optimizer.zero_grad()
            row_BN, present_BN = pack(loss_rows(batch))
            hidden_SBND = torch.stack([take_rows(hidden_BTD.detach(), row_BN) for hidden_BTD in hiddens])
            hidden_SBND.requires_grad_(True)
            feature_BND = take_rows(batch.feature_BTD[:, 1:], row_BN)
            chosen = self.objective.candidates
            clock.lap("rest")
            head = chosen.rows(self.lent, batch) if chosen else HeadRows.whole(self.lent)
            hidden_SND, feature_ND = hidden_SBND[:, present_BN], feature_BND[present_BN]
            clock.lap(
                "vocabulary", losses.vocabulary(hidden_SND, feature_ND, head, (0.1, 0.1), make_objective(SPEC).topk)
            )
            clock.lap("alignment", csra(hidden_SBND, present_BN, SPEC.csra_temperature))
        del clock.seconds["rest"]
        return clock.seconds


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begun_s = busy_s()

    def lap(self, name: str, value: Any = None) -> Any:
        """Note what passed since the lap before as `name`, and hand on the value whose making it was."""
        now_s = busy_s()
        self.seconds[name], self.begun_s = now_s - self.begun_s, now_s
        return value


def vocabulary_rows(name: str) -> list[dict[str, Any]]:
    """One row for each form of the loss, in turns on one batch."""
    config, quick = VOCABULARIES[name], int(PRESETS["quick"]["candidates"])
    made = {
        ("whole", "float32"): Form.make(config, 0, torch.float32),
        ("candidates", "float32"): Form.make(config, quick, torch.float32),
        ("candidates", "bfloat16"): Form.make(config, quick, torch.bfloat16),
    }
    device = next(iter(made.values())).lent.head_VD.device
    # Answers repeat a few thousand tokens, and those are the frequent ones.
    few = config | {"vocab_size": quick // 2}
    short, batch = random_batch(few, 1, 2 * PROMPT, device), random_batch(few, 2, 256, device)
    for one in made.values():
        one.step(short)
    turns = [{form: one.step(batch) for form, one in made.items()} for _ in range(TURNS)]
    rows = []
    for variant, precision in made:
        steps = [turn[variant, precision] for turn in turns]
        parts = {part: min(step[part] for step in steps) for part in steps[0]}
        step_s = min(sum(step[part] for part in ("unroll", "loss", "backward", "update")) for step in steps)
        job = Job("fast", 256, config, precision, 2, 0.0, quick if variant == "candidates" else 0)
        row = in_own_process(job) | {"shape": name, "vocabulary": config["vocab_size"], "variant": variant}
        rows.append(row | {"step_s": step_s, "tokens_per_s": batch.ids_BT.numel() / step_s, "part_s": parts})
    return rows


def limit_memory() -> None:
    """An allocation beyond what the machine has free fails in this process, instead of waking the kernel's killer."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    if not torch.cuda.is_available():  # CUDA reserves address space by the terabyte
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * free), resource.RLIM_INFINITY))


def in_own_process(job: Job) -> dict[str, Any]:
    """The row of a job; `out_of_memory` where it does not fit."""
    command = [sys.executable, "-m", "benchmarks.train", "--job", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"variant": job.variant, "length": job.length, "batch_size": job.batch_size, "precision": job.precision}
    if done.returncode == 0:
        return row | json.loads(done.stdout)
    if any(sign in done.stderr for sign in ("not enough memory", "bad_alloc", "out of memory", "MemoryError")):
        return row | {"out_of_memory": True}
    raise RuntimeError(done.stderr)


def jobs(recipe: Recipe, lengths: list[int], budget_s: float) -> list[Job]:
    """Fast and eager at each length, neighbours in time; on a GPU also the 8B shape."""
    target = load_target(recipe.target)
    config = drafter_shape(target.model.config)
    found = []
    for length in lengths:
        fitting = config | {"max_position_embeddings": max(length, config["max_position_embeddings"])}
        found += [Job(variant, length, fitting, budget_s=budget_s) for variant in LOSSES]
    if torch.cuda.is_available():
        found += [Job("fast", 2048, LLAMA_3_8B, "bfloat16", size, budget_s) for size in (1, 4, 8)]
    return found


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios at each length that both variants fit; on a GPU, the best of the 8B rows."""
    found: dict[str, Any] = {}
    plain = {
        (row["variant"], row["length"]): row for row in rows if "shape" not in row and row["precision"] == "float32"
    }
    for variant, length in plain:
        pair = plain["fast", length], plain.get(("eager", length), {})
        if variant == "eager" and all("tokens_per_s" in row for row in pair):
            for name in ("tokens_per_s", "peak_bytes"):
                found[f"{name}_over_eager_{length}"] = pair[0][name] / pair[1][name]
    for row in rows:
        if "shape" in row:
            whole = next(other for other in rows if other.get("shape") == row["shape"])
            name = f"step_{row['variant']}_{row['precision']}_over_whole_{row['vocabulary']}"
            found[name] = row["step_s"] / whole["step_s"]
    if large := [row for row in rows if "shape" not in row and row["precision"] == "bfloat16" and "peak_bytes" in row]:
        best = max(large, key=lambda row: row["tokens_per_s"])
        found["llama_3_8b_shape"] = {
            "tokens_per_s": best["tokens_per_s"],
            "peak_gib": best["peak_bytes"] / 2**30,
            "share_of_dense_bf16_peak": best["share_of_dense_bf16_peak"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.YAML SECTION.KEY=VALUE")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds of steps of each variant")
    parser.add_argument("--vocabularies", nargs="*", default=list(VOCABULARIES), choices=VOCABULARIES)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        limit_memory()
        print(json.dumps(Job(**json.loads(options.job)).run()))
        return
    rows = []
    for job in jobs(read_recipe(options.arguments), options.lengths, options.budget_s):
        rows.append(in_own_process(job))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for name in options.vocabularies:
        rows += vocabulary_rows(name)
        print(json.dumps(rows[-3:]), file=sys.stderr, flush=True)
    print(record("train", figures(rows), rows))


if __name__ == "__main__":
    main()
