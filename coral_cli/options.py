"""What the commands share: one variadic argument for recipe and overrides, and the folder of runs.

The recipe room is imported when a command runs, not before: PyYAML alone is a sixth of the time that `--help` takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral_cli import hints
from coral_core.errors import CoralError

if TYPE_CHECKING:
    from coral_core.decoding.engine import Engine
    from coral_core.recipe.schema import Recipe
    from coral_core.run import Run
    from coral_core.target.target import Target

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
RECIPE = "recipe.yaml"
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
    if files and re.fullmatch(r"(target|data|train|head|decode)\.\w+", files[0]) and not Path(files[0]).exists():
        raise CoralError(f"{files[0]} is no recipe file, and a key wants a value: {files[0]}=VALUE")
    return load_recipe(Path(files[0]) if files else None, overrides)


@contextlib.contextmanager
def open_run(arguments: list[str] | None, runs: Path, *, main: bool | None = None) -> Iterator[Run]:
    """The run that a command works in: the folder RUNS/NAME, made where it is missing, and locked meanwhile.

    The resolved recipe is kept there as recipe.yaml when the command succeeds or is interrupted, not when it fails; a
    folder in which nothing was made is removed. `main` says, of a command that several processes may run together,
    whether this is the main one: the others only look. Raises CoralError for a folder that cannot be written or is in
    use, and for a command that works in one process and was started in several.
    """
    if main is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CoralError("this command works in one process. Start it without accelerate launch or torchrun")
    if main is False:
        yield look_at_run(arguments, runs)
        return
    from coral_core.artifacts import tell_full, write_text
    from coral_core.lock import locked
    from coral_core.recipe.loader import dump_yaml
    from coral_core.run import Run

    recipe = read_recipe(arguments)
    run = Run(recipe, runs / recipe.name)
    with contextlib.ExitStack() as held:
        with _written(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            held.callback(_remove_if_empty, run.folder)
            held.enter_context(locked(run.folder, shlex.join(sys.argv[1:])))
        try:
            yield run
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # a full disk: the command line that goes on says the recipe too
                write_text(run.folder / RECIPE, dump_yaml(recipe))
            raise
        except Exception as error:
            tell_full(error, run.folder)
            raise
        with _written(run.folder):
            write_text(run.folder / RECIPE, dump_yaml(recipe))


def look_at_run(arguments: list[str] | None, runs: Path) -> Run:
    """The run that a command only reads, or whose writing process is another one."""
    from coral_core.run import Run

    recipe = read_recipe(arguments)
    return Run(recipe, runs / recipe.name)


def engine_of(run: Run, target: Target) -> Engine:
    """The run's engine; its folder is made where it is missing, to keep what the engine measured on this device."""
    from coral_cli.console import tell

    with contextlib.suppress(OSError):
        run.folder.mkdir(parents=True, exist_ok=True)
    engine = run.engine(target)
    tell(hints.pasteable(drafter_from(run.made, run)), "dim")
    return engine


def drafter_from(made: Path, run: Run) -> str:
    """Where drafter and head come from, for the user."""
    from coral_core import embedded

    if made != embedded.FOLDER or run.recipe.name == embedded.NAME:
        return f"drafter and head from {made}"
    if (run.folder / "drafter").exists():  # a drafter that is compared, beside the run's own
        return "a drafter and head that ship with coral, for pico"
    return f"{run.folder} has no drafter yet: this one ships with coral, for pico. Your own: coral prepare-data"


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    from coral_core.artifacts import tell_full

    try:
        yield
    except OSError as error:
        tell_full(error, folder)
        raise CoralError(f"cannot write {folder}: {error.strerror}. Choose another folder with --runs") from error


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
