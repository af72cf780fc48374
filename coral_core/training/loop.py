"""The training loop: fetch, forward, backward, clip, step, log, save.

Devices, mixed precision, gradient accumulation and several processes are accelerate's; `accelerate launch` and
`torchrun` work unchanged. The loss of an optimizer step is a sum over all its micro-batches and processes, divided by
the rows that count in all of them.
"""

import dataclasses
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate

from coral_core.drafter.model import Drafter
from coral_core.errors import CoralError, CoralWarning
from coral_core.kernels.precision import GAIN, bfloat16_over_float32, mixed_precision, no_gradient_in_bfloat16
from coral_core.processes import agreed, processes
from coral_core.progress import Progress, silent
from coral_core.recipe.schema import TrainSpec
from coral_core.store.store import Store
from coral_core.training.checkpoint import Checkpoints
from coral_core.training.depths import by_depth
from coral_core.training.meter import Meter
from coral_core.training.trainer import Trainer, learning_rate

CLIP_NORM = 0.5
"""Largest global norm of the gradient."""

Measure = Callable[[Drafter], float]
"""Real tokens per round of a drafter, by decoding held-out prompts: passed in, since decoding is another room."""


@dataclasses.dataclass(frozen=True)
class Reports:
    """Where a training says how it goes; all on the main process only."""

    log: Callable[[dict[str, Any]], None]
    """Gets one JSON-able dict every LOG_EVERY optimizer steps."""
    progress: Progress = silent
    measure: Measure | None = None
    """Called every `eval_every` steps and at the end."""


LOG_EVERY = 10
"""Optimizer steps between two lines of the log; its numbers are means over them."""


def train(
    spec: TrainSpec,
    store: Store,
    *,
    seed: int,
    work: Path,
    reports: Reports,
    also: Mapping[str, Any] | None = None,
) -> Drafter:
    """Train a drafter on a store's features, going on from the checkpoints in `work` if there are any.

    These must be of the same identity, to which `also` belongs. With `reports.measure`, the drafter that it scored
    highest is returned, else the last; on the CPU, in float32. Raises CoralError when the loss or the gradient is not
    finite, before the update.
    """
    spec = settled(spec)
    accelerator = make_accelerator(spec, work)
    trainer = Trainer(spec, store, seed, accelerator)
    who = identity(spec, store, seed, accelerator.num_processes) | dict(also or {})
    checkpoints = Checkpoints(work / "checkpoints", who)
    trainer.restore(checkpoints.load())
    meter = Meter(accelerator)
    micro_batches = trainer.micro_batches()
    reports.progress("train", trainer.step, spec.steps, {})
    while trainer.step < spec.steps:
        micros = list(itertools.islice(micro_batches, spec.accumulate))
        count = trainer.count_rows(micros)
        for micro in micros:
            with trainer.synchronised_only_if(micro is micros[-1]):
                loss, parts = trainer.loss(micro)
                accelerator.backward(loss * (accelerator.num_processes / count))
            meter.add(loss.detach(), parts, micro.tokens)
        norm = accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP_NORM)
        meter.close_step(count, norm)
        refuse_non_finite(trainer, meter)
        trainer.update()
        if trainer.step % LOG_EVERY == 0 or trainer.step == spec.steps:
            numbers = meter.summary() | {"learning_rate": learning_rate(spec, trainer.step - 1)}
            if accelerator.is_main_process:
                reports.log({"stage": "train", "step": trainer.step, **numbers})
            accelerator.log(numbers, step=trainer.step)
        reports.progress("train", trainer.step, spec.steps, meter.shown)
        if reports.measure and (trainer.step % spec.eval_every == 0 or trainer.step == spec.steps):
            with meter.paused():
                keep_best(trainer, checkpoints, reports)
        if trainer.step % spec.checkpoint_every == 0 and trainer.step < spec.steps:
            checkpoint = trainer.checkpoint()
            if accelerator.is_main_process:
                checkpoints.save(checkpoint)
    best = checkpoints.best() if reports.measure else None
    drafter = trainer.drafter(best[2] if best else None)
    for tracker in accelerator.trackers:  # not `end_training`: it ends the group of processes, which are not done
        tracker.finish()
    accelerator.free_memory()
    return drafter


def keep_best(trainer: Trainer, checkpoints: Checkpoints, reports: Reports) -> None:
    """Decode with the drafter as it is, on the main process while the others wait, and keep it if it is the best."""
    weights = trainer.checkpoint().weights
    if reports.measure and trainer.accelerator.is_main_process:
        drafter, device = trainer.drafter(weights), trainer.accelerator.device
        depths = by_depth(drafter.to(device), trainer.lent, trainer.store, device)
        score = reports.measure(drafter)
        checkpoints.save_best(trainer.step, score, weights)
        reports.log({"stage": "acceptance", "step": trainer.step, "tokens_per_round": score, **depths})
    trainer.accelerator.wait_for_everyone()


def settled(spec: TrainSpec) -> TrainSpec:
    """With what `precision: auto` is on this machine, as the main process finds it."""
    if spec.precision != "auto":
        return spec
    precision = agreed(lambda: mixed_precision(processes().device))
    return dataclasses.replace(spec, precision=precision)


def make_accelerator(spec: TrainSpec, work: Path) -> accelerate.Accelerator:
    """accelerate's idea of this machine. Raises CoralError for a precision or a tracker that it does not have."""
    tracker = None if spec.tracker == "none" else spec.tracker
    if tracker and not importlib.util.find_spec(tracker):
        raise CoralError(f"train.tracker={tracker} is not installed. Run: pip install {tracker.replace('_', '-')}")
    cpu = processes().device.type == "cpu"
    if spec.precision == "bf16" and cpu and (why := no_gradient_in_bfloat16()):
        raise CoralError(f"train.precision=bf16 does not work on this machine: {why}. Set train.precision=auto")
    if spec.precision == "bf16" and cpu and (times := bfloat16_over_float32()) > GAIN:
        slower = f"products take this processor {times:.1f} times as long in it as in float32"
        warnings.warn(f"train.precision is bf16, and {slower}. Set train.precision=auto", CoralWarning, stacklevel=2)
    try:
        accelerator = accelerate.Accelerator(mixed_precision=spec.precision, log_with=tracker, project_dir=work.parent)
    except ValueError as error:
        raise CoralError(f"train.precision={spec.precision} does not work on this machine: {error}") from error
    if tracker:
        accelerator.init_trackers("coral", config=dataclasses.asdict(spec))
    return accelerator


def identity(spec: TrainSpec, store: Store, seed: int, processes: int) -> dict[str, Any]:
    """Everything that decides what a training computes, in the recipe's own words."""
    data = store.manifest.fingerprint
    return {"seed": seed, "train": dataclasses.asdict(spec), "data": data, "processes": processes}


def refuse_non_finite(trainer: Trainer, meter: Meter) -> None:
    """Raises CoralError, on every process, when the step that was just measured must not become an update."""
    scaled = trainer.spec.precision == "fp16"  # its scaler skips steps whose gradient overflows, and lowers the scale
    if math.isfinite(meter.loss) and (scaled or math.isfinite(meter.grad_norm)):
        return
    rate = learning_rate(trainer.spec, trainer.step)
    raise CoralError(
        f"step {trainer.step + 1}: the loss is {meter.loss:.4g} and its gradient's norm {meter.grad_norm:.4g}, "
        f"so nothing was updated. Lower train.learning_rate (here {rate:.2g}), raise train.warmup_steps, "
        "or set train.precision=no"
    )
