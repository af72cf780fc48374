"""What the steps of a method cost, and how many of another's fit in the same time."""

import dataclasses
import itertools
import json
from collections.abc import Sequence

import torch

from benchmarks.clock import busy_s
from benchmarks.methods_bench import Bench, Variant, identity
from benchmarks.methods_table import METHODS
from coral_core.artifacts import fingerprint, write_text
from coral_core.recipe.schema import TrainSpec
from coral_core.training.loop import CLIP_NORM, make_accelerator
from coral_core.training.trainer import MicroBatch, Trainer, unroll_steps

TURNS = 12
"""Times that each kind of step is timed."""


def passes_of(name: str) -> int:
    """The number of passes in a cost's name, "METHOD PASSES"."""
    return int(name.split()[1])


def step_costs(bench: Bench) -> dict[str, float]:
    """Seconds of a step of each method with each number of passes, by "METHOD PASSES", measured once.

    All take the same batch in turns, and the least of TURNS counts. Where passes are drawn, at a step that draws them.
    """
    specs = {}
    for method in METHODS:
        form = dict(bench.form(method)) | {"unroll_growth": 0.0}
        for passes in range(1, bench.spec(Variant("cost", method, 0, 1, bench.form(method))).unroll_steps + 1):
            changes = tuple((form | {"unroll_steps": passes}).items())
            specs[f"{method} {passes}"] = bench.spec(Variant("cost", method, 0, 1, changes))
    what = [bench.store.manifest.fingerprint, torch.get_num_threads(), [identity(s) for s in specs.values()]]
    path = bench.run / "methods" / f"costs-{fingerprint(what)}.json"
    if not path.exists():
        accelerator = make_accelerator(bench.recipe.train, bench.run / "methods")
        trainers = {name: Trainer(spec, bench.store, 0, accelerator) for name, spec in specs.items()}
        micro = next(trainers[f"{METHODS[0]} 1"].micro_batches())
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(TURNS):
            for name, trainer in trainers.items():
                drawing = (step for step in itertools.count() if unroll_steps(trainer.spec, step, 0) == passes_of(name))
                trainer.step = next(drawing)
                times[name].append(one_step_s(trainer, micro))
        write_text(path, json.dumps({name: min(seconds) for name, seconds in times.items()}, indent=1) + "\n")
    costs: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return costs


def one_step_s(trainer: Trainer, micro: MicroBatch) -> float:
    """Seconds of a whole optimizer step on this batch."""
    begun_s = busy_s()
    loss, _ = trainer.loss(micro)
    trainer.accelerator.backward(loss / micro.rows)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP_NORM)
    trainer.update()
    return busy_s() - begun_s


def training_seconds(spec: TrainSpec, seed: int, costs: dict[str, float]) -> float:
    """What all steps of a training cost."""
    return sum(costs[f"{spec.preset} {unroll_steps(spec, step, seed)}"] for step in range(spec.steps))


def timed(
    bench: Bench, costs: dict[str, float], steps: int, seed: int, methods: Sequence[str] = METHODS
) -> list[Variant]:
    """The methods in the time that CORAL takes for `steps`."""
    part = f"equal time, {steps} steps of coral"

    def lasting(method: str) -> Variant:
        trial = Variant(part, method, seed, 1000, bench.form(method))
        share = training_seconds(bench.spec(coral), seed, costs) / training_seconds(bench.spec(trial), seed, costs)
        return dataclasses.replace(trial, steps=round(1000 * share))

    coral = Variant(part, "coral", seed, steps, bench.form("coral"))
    return [coral if method == "coral" else lasting(method) for method in methods]
