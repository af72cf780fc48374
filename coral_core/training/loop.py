"""The training loop: fetch, forward, backward, clip, step, log, save.

Devices, mixed precision, gradient accumulation and several processes are accelerate's; `accelerate launch` and
`torchrun` work unchanged. The loss of an optimizer step is a sum over all its micro-batches and processes, divided by
the rows that count in all of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate

from coral_core.drafter.model import Drafter
from coral_core.errors import CoralError
from coral_core.progress import Progress, silent
from coral_core.recipe.schema import TrainSpec
from coral_core.store.store import Store
from coral_core.training.checkpoint import Checkpoints
from coral_core.training.meter import Meter
from coral_core.training.trainer import Trainer, learning_rate

LOG_EVERY = 10
"""Optimizer steps between two lines of the log; its numbers are means over them."""


def train(
    spec: TrainSpec,
    store: Store,
    *,
    seed: int,
    work: Path,
    log: Callable[[dict[str, Any]], None],
    progress: Progress = silent,
) -> Drafter:
    """Train a drafter on a store's features, going on from the checkpoints in `work` if there are any.

    `log` gets one JSON-able dict every few optimizer steps, on the main process only. Returns the trained drafter on
    the CPU, in float32. Raises CoralError when the loss or the gradient is not finite, before the update.
    """
    accelerator = make_accelerator(spec.precision)
    trainer = Trainer(spec, store, seed, accelerator)
    checkpoints = Checkpoints(work / "checkpoints", identity(spec, store, seed, accelerator.num_processes))
    trainer.restore(checkpoints.load())
    meter = Meter(accelerator)
    micro_batches = trainer.micro_batches()
    progress("train", trainer.step, spec.steps, {})
    while trainer.step < spec.steps:
        micros = list(itertools.islice(micro_batches, spec.accumulate))
        count = trainer.count_rows(micros)
        for micro in micros:
            with trainer.synchronised_only_if(micro is micros[-1]):
                loss, parts = trainer.loss(micro)
                accelerator.backward(loss * (accelerator.num_processes / count))
            meter.add(loss.detach(), parts, micro.tokens)
        norm = accelerator.clip_grad_norm_(trainer.model.parameters(), spec.clip_norm)
        meter.close_step(count, norm)
        refuse_non_finite(trainer, meter)
        trainer.update()
        if trainer.step % LOG_EVERY == 0 or trainer.step == spec.steps:
            numbers = meter.summary() | {"learning_rate": learning_rate(spec, trainer.step - 1)}
            if accelerator.is_main_process:
                log({"stage": "train", "step": trainer.step, **numbers})
        progress("train", trainer.step, spec.steps, meter.shown)
        if trainer.step % spec.checkpoint_every == 0 and trainer.step < spec.steps:
            checkpoint = trainer.checkpoint()
            if accelerator.is_main_process:
                checkpoints.save(checkpoint)
    return trainer.drafter()


def make_accelerator(precision: str) -> accelerate.Accelerator:
    """accelerate's idea of this machine. Raises CoralError for a precision that it cannot run."""
    try:
        return accelerate.Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise CoralError(f"train.precision={precision} does not work on this machine: {error}") from error


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
