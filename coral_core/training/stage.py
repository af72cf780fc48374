"""The train stage: from runs/NAME/data to the published drafter, runs/NAME/drafter."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coral_core.artifacts import COMPATIBILITY, Manifest, Standing, partial, stage, standing
from coral_core.drafter.load import FILES, save_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError
from coral_core.processes import agreed, processes
from coral_core.progress import Progress, silent
from coral_core.recipe.loader import changes, section_fingerprint, to_mapping
from coral_core.recipe.schema import Recipe
from coral_core.store.store import Store, Tap
from coral_core.training.checkpoint import Checkpoints
from coral_core.training.loop import Measure, Reports, identity, settled, train

COMMAND = "coral prepare-data"
CHECKPOINTS = "checkpoints"
SECTIONS = ("seed", "train")
"""What of a recipe decides the drafter, besides the data."""
INDIFFERENT = {
    "seed",  # several seeds of a training share their data: only then are they compared
    "target.model",  # another name may be the same model, or a sibling: coral_cli/tapped.py looks
    "target.revision",
    "target.device",
    "target.dtype",  # `auto` is another one on another machine
    "target.graphs",
    "data.batch_size",
    "data.endpoint",
    "data.endpoint_requests",
}
"""Keys that may have changed since the data were made: what training reads of the data is the same."""


def train_drafter(
    recipe: Recipe,
    run: Path,
    progress: Progress = silent,
    measure: Measure | None = None,
    tap: Tap | None = None,
) -> tuple[Manifest, bool]:
    """Train and publish runs/NAME/drafter; (its manifest, whether anything had to be done).

    `tap` is asked for features where the store holds none. Under several processes each calls this; the main one
    writes. Raises ArtifactError when the data is missing, damaged or made for another recipe, or an unfinished training
    of another recipe is in the way.
    """
    store = open_data(recipe, run, tap)
    final = run / "drafter"
    inputs = _inputs(recipe, store)
    if finished := drafter_standing(recipe, run).manifest:
        return finished, False
    recipe = dataclasses.replace(recipe, train=settled(recipe.train))
    fingerprint = section_fingerprint(recipe, *SECTIONS, **inputs)
    state, work = processes(), partial(final)
    also = _also(recipe, inputs)
    who = identity(recipe.train, store, recipe.seed, state.num_processes) | also
    checkpoints = Checkpoints(work / CHECKPOINTS, who)
    checkpoints.refuse_stranger()
    lines: list[dict[str, Any]] = []
    publication = stage(final, fingerprint, leftovers=[CHECKPOINTS])
    with publication if state.is_main_process else contextlib.nullcontext(work):
        state.wait_for_everyone()
        with _log_file(run / "log.jsonl", lines) as log:
            reports = Reports(log, progress, measure)
            drafter = train(recipe.train, store, seed=recipe.seed, work=work, reports=reports, also=also)
        facts = _facts(store, drafter, lines, checkpoints.best() if measure else None)
        sections = {name: to_mapping(recipe)[name] for name in SECTIONS}
        manifest = Manifest(kind="drafter", fingerprint=fingerprint, inputs=inputs, recipe=sections, facts=facts)
        state.wait_for_everyone()  # all have read the best checkpoint
        if state.is_main_process:
            save_drafter(drafter, work)
            manifest = manifest.sealed(work, *FILES)
            manifest.write(work)
    state.wait_for_everyone()
    return manifest, True


def _also(recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What decides a drafter besides data and keys: where it starts from, and how the best is told."""
    start = {name: value for name, value in inputs.items() if name == "init_from"}
    return start | ({"decode": to_mapping(recipe)["decode"]} if recipe.train.eval_every else {})


def drafter_standing(recipe: Recipe, run: Path) -> Standing:
    """What stands in runs/NAME/drafter already, told by the main process to all. Raises as `train_drafter` does."""
    inputs = _inputs(recipe, open_data(recipe, run))
    sections = {name: to_mapping(recipe)[name] for name in SECTIONS}

    def differs(made: Manifest) -> str:
        auto = recipe.train.precision == "auto"  # then it is what the machine was faster in that trained it
        own = {"precision": made.recipe["train"]["precision"]} if auto and "train" in made.recipe else {}
        return changes(made, sections | {"train": sections["train"] | own}, inputs)

    return agreed(lambda: standing(run / "drafter", "drafter", differs))


def _inputs(recipe: Recipe, store: Store) -> dict[str, str]:
    """Fingerprints of what a training reads."""
    inputs = {"target": store.manifest.inputs["target"], "data": store.manifest.fingerprint}
    if start := recipe.train.init_from:
        try:
            inputs["init_from"] = Manifest.read(Path(start), "drafter", "coral train").fingerprint
        except ArtifactError as error:
            reason = str(error).partition(". ")[0]
            raise ArtifactError(
                f"train.init_from is {start}: {reason}. Set it to the folder of a drafter, such as runs/NAME/drafter"
            ) from error
    return inputs


def open_data(recipe: Recipe, run: Path, tap: Tap | None = None) -> Store:
    """The run's features. Raises ArtifactError when they were made for another recipe, naming the first key."""
    store = Store.open(run / "data", COMMAND, tap)
    if difference := _other_key(store.manifest.recipe, to_mapping(recipe)):
        key, was, now = difference
        raise ArtifactError(
            f"the data in {store.folder} was made with {key}={was}; this recipe says {key}={now}. "
            f"Run {COMMAND} with this recipe, or give {key} its old value"
        )
    return store


def _other_key(made: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """(dotted key, old, new) of the first key in `made` that `wanted` has with another value."""
    for name, was in made.items():
        key, now = prefix + name, wanted.get(name, was)
        if key in INDIFFERENT or was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            if difference := _other_key(was, now, f"{key}."):
                return difference
        else:
            return key, was, now
    return None


@contextlib.contextmanager
def _log_file(path: Path, lines: list[dict[str, Any]]) -> Iterator[Any]:
    """A function that appends its dict to the file at once, and to `lines`. A line that was cut off stays alone."""
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if cut else "")

        def log(line: dict[str, Any]) -> None:
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield log


def _facts(
    store: Store, drafter: Drafter, lines: list[dict[str, Any]], best: tuple[int, float, Any] | None
) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "dtype": "float32",
        "drafter_config": drafter.config.to_json(),
        COMPATIBILITY: store.manifest.facts.get(COMPATIBILITY),
        "data": {name: store.manifest.facts[name] for name in ("samples", "tokens", "answer_tokens")},
        "last": next((line for line in reversed(lines) if line["stage"] == "train"), {}),
        "best": {"step": best[0], "tokens_per_round": best[1]} if best else None,
    }
