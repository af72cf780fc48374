"""What a training would take, before it is begun: steps are counted, memory and time measured on a few of them."""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from coral_core.recipe.schema import TrainSpec
from coral_core.store.store import Store
from coral_core.training.loop import make_accelerator, settled
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
    precision: str
    peak_bytes: int
    """Memory of the device at its highest; on a CPU the whole process's."""
    elapsed_s: float
    """With every unroll step of the recipe; a schedule that begins with fewer, or draws fewer, takes less."""


def estimate(spec: TrainSpec, store: Store, seed: int) -> Estimate:
    """Make a few updates of a trainer that is thrown away; write nothing. Raises what `train` would raise."""
    spec = settled(spec)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(dataclasses.replace(spec, tracker="none"), Path(folder))
        trainer = Trainer(spec, store, seed, accelerator)
        late = range(max(0, spec.steps - LATE), spec.steps)
        trainer.step = max(late, key=lambda step: unroll_steps(spec, step, seed))
        micro_batches = trainer.micro_batches()
        timed = [_timed(trainer, micro_batches) for _ in range(1 + TIMED)][1:]
    elapsed_s, tokens = (sum(column) for column in zip(*timed, strict=True))
    samples = spec.steps * spec.batch_size * spec.accumulate * accelerator.num_processes
    total = round(samples * tokens / (TIMED * spec.batch_size))
    return Estimate(
        steps=spec.steps,
        epochs=samples / max(1, len(store.train_indices)),
        tokens=total,
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        precision=spec.precision,
        peak_bytes=_peak_bytes(accelerator.device),
        elapsed_s=elapsed_s / tokens * total / accelerator.num_processes,
    )


def _timed(trainer: Trainer, micro_batches: Iterator[MicroBatch]) -> tuple[float, int]:
    """Seconds and tokens of one micro-batch, its reading and an update included: the target answers meanwhile where the
    store holds no features. The schedule stays where it is."""
    begun, step = time.perf_counter(), trainer.step
    micro = next(micro_batches)
    loss, _ = trainer.loss(micro)
    trainer.accelerator.backward(loss / max(1, micro.rows))
    trainer.update()
    trainer.step = step
    if trainer.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun, micro.tokens


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows, which has no `resource`
        return int(memory.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
