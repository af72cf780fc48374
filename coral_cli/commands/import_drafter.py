"""`coral import`: a drafter from elsewhere into a run."""

from __future__ import annotations

from typing import Annotated

import typer

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, open_run
from coral_core.errors import CoralError


def _refuse_recipe(path: str) -> str:
    """Raises CoralError for a recipe in the place of PATH."""
    if path.endswith((".yaml", ".yml")):
        raise CoralError(f"{path} is a recipe, and the drafter's PATH comes first. Run: coral import PATH {path}")
    return path


def import_drafter(
    path: Annotated[
        str,
        typer.Argument(
            callback=_refuse_recipe,
            metavar="PATH",
            help="Folder or Hub id: EAGLE-1, EAGLE-2, EAGLE-3, HASS, or coral's.",
        ),
    ],
    arguments: Arguments = None,
    runs: RunsOption = RUNS,
) -> None:
    """Take a drafter into RUNS/NAME/drafter, for the recipe's target, after checking that it is whole and fits."""
    from coral_cli.console import tell
    from coral_core.drafter.hub import fetch
    from coral_core.export.bring_in import bring_in
    from coral_core.target.load import load_target

    fetch(path)  # a slip in the path is answered before the target loads
    with open_run(arguments, runs) as run:
        manifest, with_head = bring_in(path, run.folder, load_target(run.recipe.target))
        next_step = "coral eval head.kind=full, or coral prepare-data and coral group-head"
        if with_head or manifest.facts["drafter_config"].get("draft_vocab_size"):  # an LM head, grouped or of its own
            next_step = "coral eval"
        written = f"{manifest.facts['parameters']:,} parameters written to {run.folder / 'drafter'}"
        tell(f"{written}. Next: {hints.pasteable(next_step)}")
