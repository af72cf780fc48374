"""What a training would take, before it is begun: steps are counted, memory and time measured on a few of them."""

import dataclasses
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from coral_core.recipe.schema import TrainSpec
from coral_core.store.store import Store
from coral_core.training.loop import make_accelerator
from coral_core.training.trainer import MicroBatch, Trainer, unroll_steps

LATE = 100
"""Steps at the schedule's end, of which one with the most passes is timed."""
TIMED = 3
"""Micro-batches that are timed, after one that is not: the first one compiles kernels and allocates."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of the whole training, on this process's device."""

    steps: int
    epochs: float
    tokens: int
    parameters: int
    peak_bytes: int
    """Memory of the device at its highest; on a CPU the whole process's."""
    elapsed_s: float
    """With every unroll step of the recipe; a schedule that begins with fewer, or draws fewer, takes less."""


def estimate(spec: TrainSpec, store: Store, seed: int) -> Estimate:
    """Run a few micro-batches forward and backward, update nothing, write nothing. Raises what `train` would raise."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(dataclasses.replace(spec, tracker="none"), Path(folder))
        trainer = Trainer(spec, store, seed, accelerator)
        late = range(max(0, spec.steps - LATE), spec.steps)
        trainer.step = max(late, key=lambda step: unroll_steps(spec, step, seed))
        micros = list(itertools.islice(trainer.micro_batches(), 1 + TIMED))
        seconds = [_seconds(trainer, micro) for micro in micros]
    elapsed_s, tokens = sum(seconds[1:]), sum(micro.tokens for micro in micros[1:])
    samples = spec.steps * spec.batch_size * spec.accumulate * accelerator.num_processes
    total = round(samples * tokens / (TIMED * spec.batch_size))
    return Estimate(
        steps=spec.steps,
        epochs=samples / max(1, len(store.train_indices)),
        tokens=total,
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        peak_bytes=_peak_bytes(accelerator.device),
        elapsed_s=elapsed_s / tokens * total / accelerator.num_processes,
    )


def _seconds(trainer: Trainer, micro: MicroBatch) -> float:
    begun = time.perf_counter()
    loss, _ = trainer.loss(micro)
    trainer.accelerator.backward(loss / max(1, micro.rows))
    if trainer.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
