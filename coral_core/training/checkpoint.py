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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coral_core.artifacts import (
    OWN_SUM,
    file_sha256,
    fingerprint,
    first_difference,
    replace_folder,
    versions,
    write_text,
)
from coral_core.errors import ArtifactError
from coral_core.recipe.loader import settled

STATE = "state.json"
WEIGHTS = "weights.safetensors"
FILES = (WEIGHTS, "optimizer.safetensors")
T = TypeVar("T")
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
    """The state of float16's gradient scaler, where there is one."""


class Checkpoints:
    """The checkpoints of one training; `identity` is everything that decides what it computes."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint whole, call it latest, and drop the oldest."""
        name = f"step-{checkpoint.step:08d}"
        temporary = self._begin(f".{name}.tmp")
        for file, tensors in zip(FILES, (checkpoint.weights, checkpoint.optimizer), strict=True):
            save_file(tensors, temporary / file)
        state = {"step": checkpoint.step, **checkpoint.numbers, "identity": self.identity, "versions": versions()}
        state["files"] = {file: file_sha256(temporary / file) for file in FILES}
        _write_state(temporary, state)
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
        save_file(weights, temporary / WEIGHTS)
        sums = {WEIGHTS: file_sha256(temporary / WEIGHTS)}
        state = {"step": step, "score": score, "identity": self.identity, "files": sums}
        _write_state(temporary, state)
        replace_folder(temporary, self.folder / "best")

    def best(self) -> tuple[int, float, dict[str, torch.Tensor]] | None:
        """(step, score, weights) of the best so far; None when nothing was measured."""
        folder = self.folder / "best"
        if not folder.exists():
            return None
        try:
            state = _whole_state(folder)
            return state["step"], state["score"], load_file(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
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
        """The latest checkpoint, or the one before it where that is damaged; None when there is none.

        Raises ArtifactError when all are damaged, or were made under another identity (naming the key that differs).
        """
        self.refuse_stranger()
        return self._first_whole(self._read)

    def refuse_stranger(self) -> None:
        """Raises ArtifactError when the latest checkpoint was made by another recipe or from other data."""
        state = self._state()
        if state is None:
            return
        was = settled(state["identity"])
        now = {name: value for name, value in settled(self.identity).items() if name in was}  # it may be an older one's
        if difference := first_difference(was, now):
            key, was, now = difference
            raise ArtifactError(
                f"the unfinished training in {self.folder} has {key} {was}; this run has {now}. "
                f"Give {key} its old value to go on, or drop that training. Run: coral train --restart"
            )

    def _state(self) -> dict[str, Any] | None:
        return self._first_whole(_read_state)

    def _first_whole(self, read: Callable[[Path], T]) -> T | None:
        """What `read` finds in the latest checkpoint, else in the newest other that it can read."""
        latest = self.folder / "latest"
        if not latest.exists():
            return None
        others = sorted(self.folder.glob("step-*"), reverse=True)
        error: Exception | None = None
        for folder in sorted(others, key=lambda other: other.name != latest.read_text(errors="replace").strip()):
            try:
                return read(folder)
            except (OSError, ValueError, KeyError, SafetensorError) as damage:
                error = error or self._damaged(folder, damage)
        raise error or self._damaged(self.folder, ValueError("no checkpoint is there"))

    def _read(self, folder: Path) -> Checkpoint:
        state = _whole_state(folder)
        weights, optimizer = (load_file(folder / name) for name in FILES)
        numbers = {key: value for key, value in state.items() if key not in ("step", "identity", "versions")}
        return Checkpoint(state["step"], weights, optimizer, numbers)

    def _damaged(self, folder: Path, error: Exception) -> ArtifactError:
        return ArtifactError(f"the checkpoint {folder} is damaged: {error}. Run: coral train --restart")


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    write_text(folder / STATE, json.dumps({**state, OWN_SUM: fingerprint(state)}, indent=2) + "\n")


def _read_state(folder: Path) -> dict[str, Any]:
    """What state.json says. Raises ValueError when it is damaged; that of earlier versions has no checksum."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        own_sum = state.pop(OWN_SUM, None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{STATE}: {error}") from error
    if own_sum is not None and own_sum != fingerprint(state):
        raise ValueError(f"{STATE} has another checksum than was written")
    return state


def _whole_state(folder: Path) -> dict[str, Any]:
    """state.json without its checksums. Raises ValueError for a file beside it that has another."""
    state = _read_state(folder)
    for name, sha256 in state.pop("files", {}).items():  # none in those of earlier versions
        if file_sha256(folder / name) != sha256:
            raise ValueError(f"{name} has another checksum than was written")
    return state
