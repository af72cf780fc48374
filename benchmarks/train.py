"""Training's speed and peak memory at three lengths, against the eager reference: ratios of one run on one machine.

    python -m benchmarks.train                  # [RECIPE.YAML] [section.key=value ...]: the target gives the shape

One optimizer step of CORAL (three unroll steps, every loss) on one dialogue of T tokens, nearly all of them an answer,
so that nothing is saved by leaving rows out. The eager reference computes the same loss with all T x T scores and all
[T,V] logits under autograd. Each variant runs in a process of its own: a process's peak memory never falls.

On a GPU more rows follow: a drafter of an 8B target's shape in bfloat16, with the share of the dense peak it reaches.

Axes: B batch, T position, S unroll step, D hidden, V vocabulary.
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

from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.lent import Lent
from coral_core.recipe.schema import PRESETS, Recipe, TrainSpec
from coral_core.store.batches import Batch
from coral_core.target.load import drafter_shape, load_target
from coral_core.training import losses
from coral_core.training.alignment import csra, take_rows
from coral_core.training.attention import attend_eager
from coral_core.training.objective import pack
from coral_core.training.trainer import make_objective
from coral_core.training.unroll import Unroll, loss_rows, unroll_rows

LENGTHS = (512, 2048, 8192)
PROMPT = 8
SPEC = TrainSpec(**{"preset": "coral", **PRESETS["coral"]})  # type: ignore[arg-type]
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

    def run(self) -> dict[str, Any]:
        """Train for `budget_s` seconds, at least one step, and measure."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lent = random_lent(self.config, device, getattr(torch, self.precision))
        model = Unroll(Drafter(DrafterConfig(**self.config)).to(device), SPEC.unroll_steps)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        batch = random_batch(self.config, self.batch_size, self.length, device)

        def step(batch: Batch) -> None:
            mixed = self.precision != "float32"
            with torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = LOSSES[self.variant](model, lent, batch)
            (loss / loss_rows(batch).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), SPEC.clip_norm)
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


def fast(model: Unroll, lent: Lent, batch: Batch) -> torch.Tensor:
    """The loss as `coral train` computes it."""
    return make_objective(SPEC)(model(lent, batch), batch, lent)[0]


def eager(model: Unroll, lent: Lent, batch: Batch) -> torch.Tensor:
    """The same number from the references."""
    embed_BRD, feature_BRD = lent.embed(batch.ids_BT[:, 1:]), batch.feature_BTD[:, :-1]
    rows = [batch.valid_BT[:, 1:]] * model.steps
    hiddens = unroll_rows(model.drafter, (embed_BRD.to(feature_BRD.dtype), feature_BRD), rows, attend_eager)
    row_BA, present_BA = pack(loss_rows(batch))
    hidden_SBAD = torch.stack([take_rows(hidden_BRD, row_BA) for hidden_BRD in hiddens])
    feature_BAD = take_rows(batch.feature_BTD[:, 1:], row_BA)
    feature_ND, total = feature_BAD[present_BA], torch.zeros((), device=feature_BAD.device)
    for hidden_ND in hidden_SBAD[:, present_BA]:
        total = total + SPEC.regression_weight * losses.regression(hidden_ND, feature_ND)
        total = total + SPEC.distill_weight * losses.distill(hidden_ND, feature_ND, lent)
        total = total + SPEC.topk_weight * losses.topk(hidden_ND, feature_ND, lent, SPEC.topk)
    token_BA = batch.ids_BT.gather(1, (row_BA + 2).clamp(max=batch.ids_BT.shape[1] - 1))
    alignment = make_objective(SPEC).alignment
    total = total + SPEC.csra_weight * csra(hidden_SBAD, feature_BAD, present_BA, token_BA, alignment)
    return total / model.steps


LOSSES = {"fast": fast, "eager": eager}


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
    plain = {(row["variant"], row["length"]): row for row in rows if row["precision"] == "float32"}
    for variant, length in plain:
        pair = plain["fast", length], plain.get(("eager", length), {})
        if variant == "eager" and all("tokens_per_s" in row for row in pair):
            for name in ("tokens_per_s", "peak_bytes"):
                found[f"{name}_over_eager_{length}"] = pair[0][name] / pair[1][name]
    if large := [row for row in rows if row["precision"] == "bfloat16" and "tokens_per_s" in row]:
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
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds of steps of each variant")
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
    print(record("train", figures(rows), rows))


if __name__ == "__main__":
    main()
