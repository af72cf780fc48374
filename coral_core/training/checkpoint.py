"""Where a training that was interrupted goes on from, bit for bit.

    checkpoints/latest                     the name of the newest whole checkpoint
    checkpoints/step-00000100/             weights.safetensors, optimizer.safetensors, state.json
    checkpoints/best/                      weights.safetensors, state.json, where acceptance is measured in training

Every random draw of the loop is keyed by the seed and the number of the micro-batch, so the position in the data is the
state of the generators too. A checkpoint is written under a temporary name, renamed, and only then called latest.
Not the published drafter: that is stage.py's.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coral_core.artifacts import replace_folder, versions, write_text
from coral_core.errors import ArtifactError

KEEP = 2
"""Checkpoints kept, the newest included."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What one optimizer step leaves behind: flat tensors, and numbers that JSON holds."""

    step: int
    """Optimizer steps done."""
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    """By "weight name/what", as in "fc.weight/exp_avg"."""
    numbers: dict[str, Any]
    """Counters of the loop: micro-batches and tokens consumed, seconds."""


class Checkpoints:
    """The checkpoints of one training; `identity` is everything that decides what it computes."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint whole, call it latest, and drop the oldest."""
        name = f"step-{checkpoint.step:08d}"
        temporary = self._begin(f".{name}.tmp")
        save_file(checkpoint.weights, temporary / "weights.safetensors")
        save_file(checkpoint.optimizer, temporary / "optimizer.safetensors")
        state = {"step": checkpoint.step, **checkpoint.numbers, "identity": self.identity, "versions": versions()}
        write_text(temporary / "state.json", json.dumps(state, indent=2) + "\n")
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_text(self.folder / "latest", name + "\n")
        self._drop_old()

    def save_best(self, step: int, score: float, weights: dict[str, torch.Tensor]) -> None:
        """Keep these weights if no others scored higher so far."""
        best = self.best()
        if best is not None and best[1] >= score:
            return
        temporary = self._begin(".best.tmp")
        save_file(weights, temporary / "weights.safetensors")
        state = {"step": step, "score": score, "identity": self.identity}
        write_text(temporary / "state.json", json.dumps(state, indent=2) + "\n")
        replace_folder(temporary, self.folder / "best")

    def best(self) -> tuple[int, float, dict[str, torch.Tensor]] | None:
        """(step, score, weights) of the best so far; None when nothing was measured."""
        folder = self.folder / "best"
        if not folder.exists():
            return None
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return state["step"], state["score"], load_file(folder / "weights.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise self._damaged(folder, error) from error

    def _begin(self, name: str) -> Path:
        temporary = self.folder / name
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def _drop_old(self) -> None:
        for old in sorted(self.folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)

    def load(self) -> Checkpoint | None:
        """The latest checkpoint, or None when there is none.

        Raises ArtifactError when it is damaged, or was made under another identity (naming the key that differs).
        """
        state = self._state()
        if state is None:
            return None
        self.refuse_stranger()
        folder = self.folder / f"step-{state['step']:08d}"
        try:
            weights, optimizer = (load_file(folder / f"{part}.safetensors") for part in ("weights", "optimizer"))
        except (OSError, SafetensorError) as error:
            raise self._damaged(folder, error) from error
        numbers = {key: value for key, value in state.items() if key not in ("step", "identity", "versions")}
        return Checkpoint(state["step"], weights, optimizer, numbers)

    def refuse_stranger(self) -> None:
        """Raises ArtifactError when the latest checkpoint was made by another recipe or from other data."""
        state = self._state()
        if state is None:
            return
        if difference := first_difference(state["identity"], self.identity):
            key, was, now = difference
            raise ArtifactError(
                f"the unfinished training in {self.folder} has {key} {was}; this run has {now}. "
                f"Give {key} its old value to go on, or remove {self.folder} to begin anew"
            )

    def _state(self) -> dict[str, Any] | None:
        latest = self.folder / "latest"
        try:
            name = latest.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        try:
            state: dict[str, Any] = json.loads((self.folder / name / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(self.folder / name, error) from error
        return state

    def _damaged(self, folder: Path, error: Exception) -> ArtifactError:
        return ArtifactError(f"the checkpoint {folder} is damaged: {error}. Remove {self.folder} and run: coral train")


def first_difference(was: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(dotted key, old, new) of the first value in which two nested mappings differ; `absent` where one has none."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return None if was == now else (path, was, now)
    for key in [*was, *(key for key in now if key not in was)]:
        where = f"{path}.{key}" if path else str(key)
        if difference := first_difference(was.get(key, "absent"), now.get(key, "absent"), where):
            return difference
    return None
