"""Putting an engine together from a run's folder, refusing what was made for something else."""

import dataclasses
from pathlib import Path
from typing import Any

from coral_core.artifacts import Manifest
from coral_core.decoding.drafting import TreeShape
from coral_core.decoding.engine import Engine
from coral_core.decoding.measure import tuned
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.head.load import COMMAND as HEAD_COMMAND
from coral_core.head.load import load_head
from coral_core.recipe.schema import DecodeSpec, Recipe
from coral_core.target.load import PICO, Target


@dataclasses.dataclass(frozen=True)
class Assembled:
    """An engine, and where its parts came from."""

    engine: Engine
    folder: Path
    """The run, or the package's own pico."""
    drafter_fingerprint: str


def assemble(recipe: Recipe, run: Path, target: Target) -> Assembled:
    """The engine of a run; with no drafter in the run and pico as the target, the drafter and head that coral ships.

    With `decode.tree: auto`, what a round costs on this device is read from the run, or measured now, in seconds.
    Raises ArtifactError when the drafter is missing, damaged or was trained for another target, and likewise the head.
    """
    folder = PICO if recipe.target.model == "pico" and not (run / "drafter").exists() else run
    manifest = Manifest.read(folder / "drafter", "drafter", "coral train")
    made_for = manifest.inputs.get("target")
    if made_for != target.fingerprint:
        raise ArtifactError(
            f"the drafter in {folder / 'drafter'} was trained for target {made_for}, and target "
            f"'{recipe.target.model}' is {target.fingerprint}. Run: coral prepare-data, then coral train"
        )
    drafter = Drafter.load(folder / "drafter").to(target.device, target.dtype)
    head = load_head(
        folder / "head",
        recipe.head,
        target.lent,
        target_fingerprint=target.fingerprint,
        drafter_fingerprint=manifest.fingerprint,
    )
    engine = Engine(target, drafter, head, tree_shape(recipe.decode))
    if recipe.decode.tree == "auto":
        of = {"target": target.fingerprint, "drafter": manifest.fingerprint, "head": _head_of(recipe, folder)}
        engine = tuned(engine, run, of)
    return Assembled(engine, folder, manifest.fingerprint)


def _head_of(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What tells heads apart that differ in their cost."""
    spec = recipe.head
    made = "" if spec.kind == "full" else Manifest.read(folder / "head", "head", HEAD_COMMAND).fingerprint
    return {"kind": spec.kind, "groups": spec.groups, "active": spec.active, "made": made}


def tree_shape(decode: DecodeSpec) -> TreeShape:
    """The recipe's tree, or the bounds of the one that pays."""
    return TreeShape(
        depth=decode.draft_depth,
        nodes=decode.draft_nodes,
        topk=decode.draft_topk,
        confidence=decode.draft_confidence,
    )


def sampler(recipe: Recipe) -> Sampler:
    """The recipe's distribution and seed."""
    decode = recipe.decode
    return Sampler(
        temperature=decode.temperature,
        top_p=decode.top_p,
        top_k=decode.top_k,
        min_p=decode.min_p,
        repetition_penalty=decode.repetition_penalty,
        seed=recipe.seed,
    )
