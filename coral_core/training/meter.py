"""What a training says of itself: means between two lines of the log, and the numbers beside the progress bar."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import accelerate
import torch


class Meter:
    """Sums since the last line of the log. Reads the device once per optimizer step."""

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.accelerator = accelerator
        self.begun_s = self.marked_s = time.perf_counter()
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        """Rows that each sum is over: a pass that begins between two lines has fewer than the first."""
        self.step_names: set[str] = set()
        self.step_loss = torch.zeros((), device=accelerator.device)
        self.tokens = 0
        self.loss = self.grad_norm = 0.0
        self.shown: dict[str, float] = {}
        """For the progress bar: the last step's loss, and the last line's other numbers."""

    def add(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], tokens: int) -> None:
        """Sums of one micro-batch of this process."""
        self.step_loss = self.step_loss + loss
        for name, value in {"loss": loss, **parts}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.step_names.add(name)
        self.tokens += tokens

    def close_step(self, rows: int, grad_norm: torch.Tensor) -> None:
        """End an optimizer step of `rows` rows in all processes: `loss` and `grad_norm` are then this step's."""
        self.loss = float(self.accelerator.reduce(self.step_loss, "sum")) / rows
        self.grad_norm = float(grad_norm)
        self.step_loss = torch.zeros_like(self.step_loss)
        for name in self.step_names:
            self.rows[name] = self.rows.get(name, 0) + rows
        self.step_names.clear()
        self.shown["loss"] = self.loss

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not part of the speed."""
        begun_s = time.perf_counter()
        yield
        self.marked_s += time.perf_counter() - begun_s

    def summary(self) -> dict[str, Any]:
        """The means for the log's next line, over all processes; starts the next ones."""
        tokens = torch.tensor(float(self.tokens), device=self.accelerator.device)
        *sums, tokens = self.accelerator.reduce(torch.stack([*self.sums.values(), tokens]), "sum").tolist()
        means = {name: value / max(1, self.rows[name]) for name, value in zip(self.sums, sums, strict=True)}
        now_s = time.perf_counter()
        speed = {"tokens_per_s": tokens / (now_s - self.marked_s)}
        self.shown |= speed | {name: value for name, value in means.items() if name.startswith("accuracy_")}
        self.sums, self.rows, self.tokens, self.marked_s = {}, {}, 0, now_s
        return {**means, "grad_norm": self.grad_norm, **speed, "elapsed_s": now_s - self.begun_s}
