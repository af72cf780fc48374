"""What the commands share: one variadic argument for recipe and overrides, and the folder of runs.

The recipe room is imported when a command runs, not before: PyYAML alone is a sixth of the time that `--help` takes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral_cli import hints
from coral_core.errors import CoralError

if TYPE_CHECKING:
    from coral_core.recipe.schema import Recipe
    from coral_core.run import Run

_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def _refuse_early(arguments: list[str] | None) -> list[str] | None:
    """Read the recipe while the command line is parsed: a slip is answered before a command spends seconds on torch."""
    hints.remember("recipe", arguments or [])
    read_recipe(arguments)
    return arguments


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        callback=_refuse_early,
        metavar="RECIPE.YAML SECTION.KEY=VALUE",
        help="A recipe file, then keys that win over it. Without a recipe: the embedded model pico.",
        show_default=False,
    ),
]
RUNS = Path("runs")
"""The default of --runs, in the current folder."""


def _remember_runs(runs: Path) -> Path:
    hints.remember("runs", [] if runs == RUNS else ["--runs", str(runs)])
    return runs


RunsOption = Annotated[
    Path,
    typer.Option("--runs", callback=_remember_runs, help="Folder that holds the runs; this one is in RUNS/NAME."),
]


def read_recipe(arguments: list[str] | None) -> Recipe:
    """The recipe that a command line names; writes nothing. More than one recipe file is wrong usage (exit code 2)."""
    from coral_core.recipe.loader import load_recipe

    files = [text for text in arguments or [] if not _OVERRIDE.match(text)]
    overrides = [text for text in arguments or [] if _OVERRIDE.match(text)]
    if len(files) > 1:
        raise typer.BadParameter(f"one recipe file at most, got {', '.join(files)}; overrides are section.key=value")
    return load_recipe(Path(files[0]) if files else None, overrides)


def open_run(arguments: list[str] | None, runs: Path) -> Run:
    """Load the recipe, make RUNS/NAME, and keep the resolved recipe there as recipe.yaml."""
    from coral_core.artifacts import write_text
    from coral_core.recipe.loader import dump_yaml
    from coral_core.run import Run

    recipe = read_recipe(arguments)
    folder = runs / recipe.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_yaml(recipe))
    except OSError as error:
        raise CoralError(f"cannot write {folder}: {error.strerror}. Choose another folder with --runs") from error
    return Run(recipe, folder)
