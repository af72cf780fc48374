"""What is to be compared, drafters times heads, by name: checked before anything heavy is imported or loaded."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path

from coral_core import embedded
from coral_core.errors import ArtifactError, DataError, did_you_mean
from coral_core.recipe.loader import load_recipe
from coral_core.recipe.schema import HeadSpec, Recipe

HEADS: tuple[str, ...] = typing.get_args(typing.get_type_hints(HeadSpec)["kind"])


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


def contenders(recipe: Recipe, run: Path, drafters: Sequence[str], heads: Sequence[str]) -> list[Contender]:
    """Every drafter with every head; with none named, the run's own drafter and the recipe's head. Loads nothing.

    A drafter is the name of a run beside this one, or a run's folder; its head's settings are that run's, the tree is
    this recipe's. Raises ArtifactError or DataError for a drafter or head that there is not, or that is named twice.
    """
    for kind in heads:
        if kind not in HEADS:
            hint = did_you_mean(kind, HEADS)
            raise DataError(f"unknown head '{kind}'; " + f"{hint} the heads are {', '.join(HEADS)}".lstrip())
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
    if own := embedded.shipped(name):
        return own
    known = sorted(path.parent.name for path in runs.glob("*/drafter"))
    hint = did_you_mean(name, known) or f"runs with one: {', '.join(known) or 'none'}."
    raise ArtifactError(f"no drafter in '{name}' or '{runs / name}'; {hint} Give --drafter a run's name or folder")
