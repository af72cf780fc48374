"""What is compared: drafters times heads, each an engine on the same target with the same tree."""

import dataclasses
import difflib
import statistics
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coral_core.artifacts import Manifest
from coral_core.decoding.assemble import assemble
from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.errors import ArtifactError, DataError
from coral_core.head.candidates import Candidates, Head
from coral_core.recipe.loader import load_recipe
from coral_core.recipe.schema import HeadSpec, Recipe
from coral_core.target.load import PICO, Target

HEADS: tuple[str, ...] = typing.get_args(typing.get_type_hints(HeadSpec)["kind"])
PROBE_TOKENS = 32
"""New tokens of the answer in which rows read are counted."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A drafter and a head by name, not loaded yet."""

    recipe: Recipe
    """The run's own, with this head."""
    folder: Path
    """The run that holds the drafter."""
    owner: str
    """How that run is called."""

    @property
    def name(self) -> str:
        """The drafter's run, and the head's kind."""
        return f"{self.owner} {self.recipe.head.kind}"


@dataclasses.dataclass(frozen=True)
class Method:
    """A drafter with a head, ready to decode, and what results.json says of them."""

    name: str
    engine: Engine
    folder: Path
    """Where the drafter came from: a run, or the package's own pico."""
    facts: dict[str, Any]
    """{method, drafter, head, tree}."""


def contenders(recipe: Recipe, run: Path, drafters: Sequence[str], heads: Sequence[str]) -> list[Contender]:
    """Every drafter with every head; with none named, the run's own drafter and the recipe's head. Loads nothing.

    A drafter is the name of a run beside this one, or a run's folder; its head's settings are that run's, the tree is
    this recipe's. Raises ArtifactError or DataError for a drafter or head that there is not, or that is named twice.
    """
    for kind in heads:
        if kind not in HEADS:
            near = difflib.get_close_matches(kind, HEADS, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise DataError(f"unknown head '{kind}'; {hint}The heads are {', '.join(HEADS)}")
    found = []
    for drafter in drafters or [""]:
        folder, owner = (find_run(drafter, run.parent), Path(drafter).name) if drafter else (run, recipe.name)
        own = folder / "recipe.yaml"
        spec = load_recipe(own, []).head if drafter and own.exists() else recipe.head
        for kind in heads or [spec.kind]:
            head = dataclasses.replace(spec, kind=kind)  # type: ignore[arg-type]  # checked above
            found.append(Contender(dataclasses.replace(recipe, head=head), folder, owner))
    names = [contender.name for contender in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"'{repeated[0]}' would be compared with itself; give each --drafter and --head once")
    return found


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run that has a drafter. Raises ArtifactError, naming the nearest run, when there is none."""
    for folder in (Path(name), runs / name):
        if (folder / "drafter").is_dir():
            return folder
    if name == "pico":
        return PICO
    known = sorted(path.parent.name for path in runs.glob("*/drafter"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"runs with one: {', '.join(known) or 'none'}."
    raise ArtifactError(f"no drafter in '{name}' or '{runs / name}'; {hint} Give --drafter a run's name or folder")


def load_method(contender: Contender, target: Target) -> Method:
    """Load drafter and head. Raises ArtifactError for what is missing, damaged or made for another target."""
    assembled = assemble(contender.recipe, contender.folder, target)
    manifest = Manifest.read(assembled.folder / "drafter", "drafter", "coral train")
    spec = contender.recipe.head
    head: dict[str, Any] = {"kind": spec.kind, "groups": spec.groups, "active": spec.active}
    if spec.kind != "full":
        head["fingerprint"] = Manifest.read(assembled.folder / "head", "head", "coral group-head").fingerprint
    facts = {
        "method": contender.name,
        "drafter": {
            "run": contender.owner,
            "preset": manifest.recipe.get("train", {}).get("preset"),
            "fingerprint": assembled.drafter_fingerprint,
        },
        "head": head,
        "tree": dataclasses.asdict(assembled.engine.shape),
    }
    return Method(contender.name, assembled.engine, assembled.folder, facts)


class _CountingHead:
    """A head that notes how many rows of the LM head each call read."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.rows: list[int] = []

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        found = self.head.candidates(hidden_ND)
        self.rows.append(found.token_C.unique().numel())
        return found


def rows_read(engine: Engine, prompt: list[int]) -> float:
    """LM-head rows that the drafter reads per level of the tree, the mean over a short greedy answer; not timed."""
    head = _CountingHead(engine.head)
    for _ in dataclasses.replace(engine, head=head).decode(prompt, Sampler(), PROBE_TOKENS):
        pass
    return statistics.fmean(head.rows) if head.rows else 0.0
