"""What the loop drives: the model, the optimizer, their data, and what of them a checkpoint holds.

Axes: B batch, T position, N row, D hidden, I input width.
"""

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch.distributed.checkpoint import state_dict as distributed_state

from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.load import load_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.recipe.schema import TrainSpec
from coral_core.store.batches import Batch, batch_of, batches
from coral_core.store.store import Store
from coral_core.training.candidates import Candidates
from coral_core.training.checkpoint import Checkpoint
from coral_core.training.objective import Objective
from coral_core.training.unroll import Unroll, feature_noise, loss_rows

BETAS = (0.9, 0.95)
SIZED = 8
"""Dialogues that tell the taps' sizes."""
FIRST = 0.4
"""Probability of a single pass where their number is drawn. pico, a minute: 0.4 3.33 tokens per round, 0.6 3.12."""
FINAL_RATE = 0.1
"""The cosine ends at this share of the peak rate."""
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE = distributed_state.StateDictOptions(full_state_dict=True)  # on every process: all of them restore


class Trainer:
    """Model, optimizer and data of one training; `step` counts the optimizer steps done."""

    def __init__(self, spec: TrainSpec, store: Store, seed: int, accelerator: accelerate.Accelerator) -> None:
        self.spec, self.store, self.seed, self.accelerator = spec, store, seed, accelerator
        drafter = initial_drafter(drafter_config(spec, store), seed, spec.init_from)
        self.config = drafter.config
        if self.config.taps and not (spec.init_from or self.config.fc_norm):
            drafter.expect_sizes(tap_sizes(store))
        unroll = Unroll(drafter, spec.unroll_steps, through=spec.through_steps)
        optimizer = torch.optim.AdamW(unroll.parameters(), lr=spec.learning_rate, betas=BETAS)
        self.model, self.optimizer = accelerator.prepare(unroll, optimizer)
        self.lent = store.lent().to(accelerator.device, DTYPES[spec.precision])
        self.objective = make_objective(spec, Candidates.of(store, spec.candidates, accelerator.device))
        self.step = 0

    def micro_batches(self) -> Iterator["MicroBatch"]:
        """This process's share of the micro-batches, from the position that the steps done leave."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = self.step * self.spec.accumulate * processes
        source = batches(self.store, batch_size=self.spec.batch_size, seed=self.seed, start=first)
        for number, batch in itertools.islice(enumerate(source, start=first), rank, None, processes):
            yield MicroBatch.make(batch, number, self.accelerator.device)

    def count_rows(self, micros: list["MicroBatch"]) -> int:
        """Rows that carry a loss in the whole optimizer step, all processes together; at least 1."""
        rows = torch.tensor(sum(micro.rows for micro in micros), device=self.accelerator.device)
        return max(1, int(self.accelerator.reduce(rows, "sum")))

    def synchronised_only_if(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let the processes exchange gradients on the last micro-batch only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def loss(self, micro: "MicroBatch") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sums over the rows of a micro-batch. Draws are keyed by the seed and the micro-batch's number."""
        generator = torch.Generator(self.accelerator.device).manual_seed(draw_seed(self.seed, micro.number))
        noise_BTI = None
        if width := self.spec.feature_noise:
            noise_BTI = feature_noise(micro.batch, width, generator, taps=bool(self.config.taps))
        hiddens = self.model(self.lent, micro.batch, noise_BTI, unroll_steps(self.spec, self.step, self.seed))
        return self.objective(hiddens, micro.batch, self.lent, generator)

    def update(self) -> None:
        """One step of AdamW at the schedule's rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def checkpoint(self) -> Checkpoint:
        """Everything needed to go on from here, gathered from all processes."""
        weights: dict[str, Any] = distributed_state.get_model_state_dict(self.model, options=WHOLE)
        adam: Any = distributed_state.get_optimizer_state_dict(self.model, self._adam(), options=WHOLE)
        flat = {f"{name}/{what}": value.cpu() for name, part in adam["state"].items() for what, value in part.items()}
        scaler = self.accelerator.scaler
        numbers = {"scaler": scaler.state_dict()} if scaler else {}
        return Checkpoint(self.step, {name: value.cpu() for name, value in weights.items()}, flat, numbers)

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Take weights, optimizer and position from a checkpoint, if there is one."""
        if checkpoint is None:
            return
        weights: dict[str, Any] = checkpoint.weights
        distributed_state.set_model_state_dict(self.model, weights, options=WHOLE)
        state: dict[str, Any] = {}
        for key, value in checkpoint.optimizer.items():
            name, what = key.rsplit("/", 1)
            state.setdefault(name, {})[what] = value
        whole: Any = distributed_state.get_optimizer_state_dict(self.model, self._adam(), options=WHOLE)
        distributed_state.set_optimizer_state_dict(self.model, self._adam(), {**whole, "state": state}, options=WHOLE)
        if scaler := self.accelerator.scaler:
            scaler.load_state_dict(checkpoint.numbers["scaler"])
        self.step = checkpoint.step

    def drafter(self, weights: dict[str, Any] | None = None) -> Drafter:
        """The trained drafter, whole and on the CPU; `weights` of a checkpoint take the place of the current ones."""
        weights = weights or distributed_state.get_model_state_dict(self.model, options=WHOLE)
        drafter = Drafter(self.config)
        drafter.load_state_dict({name.removeprefix("drafter."): value for name, value in weights.items()})
        return drafter.requires_grad_(False).eval()

    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """A batch on the device, with what was counted before it went there."""

    batch: Batch
    number: int
    """Its place in the run over the data, all processes together."""
    rows: int
    """Rows that carry a loss."""
    tokens: int

    @classmethod
    def make(cls, batch: Batch, number: int, device: torch.device) -> "MicroBatch":
        tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        there = {name: value.to(device) for name, value in tensors.items() if value is not None}
        moved = dataclasses.replace(batch, **there)
        return cls(moved, number, int(loss_rows(batch).sum()), int(batch.valid_BT.sum()))


def initial_drafter(config: DrafterConfig, seed: int, folder: str = "") -> Drafter:
    """The drafter in `folder`, or one whose weights depend on the seed alone.

    A drafter that was imported keeps its own shape; only the features and the words that it reads must be the target's.
    Raises ArtifactError when the folder holds none, or one for other features or another vocabulary.
    """
    if folder:
        drafter = load_drafter(Path(folder)).float().requires_grad_(True).train()
        for key in ("hidden_size", "vocab_size", "taps", "draft_vocab_size"):
            if (was := getattr(drafter.config, key)) != (now := getattr(config, key)):
                raise ArtifactError(
                    f"train.init_from={folder} has {key} {was}, this target's drafter has {now}. Set another"
                )
        return drafter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Drafter(config)


def drafter_config(spec: TrainSpec, store: Store) -> DrafterConfig:
    """The shape that a recipe asks for. Raises ArtifactError when the data hold no taps for it."""
    config = DrafterConfig(**store.manifest.facts["drafter_config"])
    if spec.shape == "eagle2":
        return config
    if not store.taps:
        raise ArtifactError(
            f"the data in {store.folder} hold no taps, which train.shape={spec.shape} reads; their answers are kept. "
            "Run: coral prepare-data"
        )
    later = spec.shape == "eagle3.1"
    return dataclasses.replace(config, taps=store.taps, norm_output=later, fc_norm=later)


def tap_sizes(store: Store) -> list[float]:
    """Root mean square of each tap's rows, the median over the tokens of the first dialogues."""
    batch = batch_of(store, store.train_indices[:SIZED])
    rows_NI = batch.read_by(taps=True)[batch.valid_BT]
    taps = rows_NI.split(rows_NI.shape[1] // len(store.taps), dim=1)
    return [float(tap_ND.square().mean(1).sqrt().median()) for tap_ND in taps]


def draw_seed(seed: int, number: int) -> int:
    """A generator's seed for a micro-batch. Hashed, since torch's CPU generator reads 32 bits of a seed."""
    return random.Random(f"{seed} {number}").getrandbits(32)


def make_objective(spec: TrainSpec, candidates: Candidates | None = None) -> Objective:
    """The loss that a recipe describes, over the whole vocabulary or over candidates."""
    return Objective(
        regression_weight=spec.regression_weight,
        distill_weight=spec.distill_weight,
        topk_weight=spec.topk_weight,
        csra_weight=spec.csra_weight,
        step_decay=spec.step_decay,
        csra_temperature=spec.csra_temperature,
        last_only=spec.unroll_drawn,
        candidates=candidates,
    )


def unroll_steps(spec: TrainSpec, step: int, seed: int) -> int:
    """Passes in optimizer step `step` (the first is 0): one more after each equal part of the growth, then all.

    With `unroll_drawn` these are the most, and how many is drawn: the same for all micro-batches and processes.
    """
    growing = spec.unroll_growth * spec.steps
    most = spec.unroll_steps if step >= growing else 1 + int((spec.unroll_steps - 1) * step / growing)
    draw = random.Random(f"{seed} passes {step}")
    if not spec.unroll_drawn or most == 1 or draw.random() < FIRST:
        return 1 if spec.unroll_drawn else most
    return draw.randint(2, most)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """The rate of optimizer step `step` (the first is 0): linear warm-up, then a cosine to a tenth of the peak."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - 1 - spec.warmup_steps)
    return spec.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
