"""`coral train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, look_at_run, open_run
from coral_cli.tapped import Tapped

if TYPE_CHECKING:
    from coral_core.artifacts import Manifest


def train(
    arguments: Arguments = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop an unfinished training, of other settings too, and begin anew.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take: steps, tokens, memory, minutes. Train nothing.")
    ] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Train the drafter on the tapped features."""
    if dry_run:
        _print_estimate(arguments, runs)
        return
    from coral_cli.console import progress_bars, tell
    from coral_core.artifacts import drop_unfinished
    from coral_core.bench.acceptance import acceptance
    from coral_core.processes import processes
    from coral_core.training.stage import drafter_standing, train_drafter

    main = processes().is_main_process
    with open_run(arguments, runs, main=main) as run:
        if restart and main:
            drop_unfinished(run.folder / "drafter")
        folder, found = run.folder / "drafter", drafter_standing(run.recipe, run.folder)
        if main:
            tell(hints.standing(folder, found, "recipe and data"))
        tapped = Tapped(run, ", or set train.eval_every=0" if run.recipe.data.features == "stored" else "")
        tapped.check()
        with progress_bars() as progress:
            measure = None
            if run.recipe.train.eval_every and not found.manifest:
                prompts = tapped.prompts  # asked for first: the target takes long to load
                measure = acceptance(run.recipe, tapped.target, prompts, progress)
            manifest, _ = train_drafter(run.recipe, run.folder, progress, measure, tapped.tap)
        if main:
            _print_summary(manifest)
            tell(f"written to {folder}. Next: {hints.pasteable('coral group-head')}")


def _print_estimate(arguments: list[str] | None, runs: Path) -> None:
    from coral_cli.console import duration_text, print_table, size_text
    from coral_core.training.estimate import estimate
    from coral_core.training.stage import open_data

    run = look_at_run(arguments, runs)
    tapped = Tapped(run, "")
    tapped.check()
    recipe = run.recipe
    expected = estimate(recipe.train, open_data(recipe, run.folder, tapped.tap), recipe.seed)
    rows = [
        ("steps", f"{expected.steps:,}"),
        ("epochs", f"{expected.epochs:.1f}"),
        ("tokens", f"{expected.tokens:,}"),
        ("parameters of the drafter", f"{expected.parameters:,}"),
        ("mixed precision", expected.precision),
        ("memory", size_text(expected.peak_bytes)),
        ("time, at most", duration_text(expected.elapsed_s)),
    ]
    print_table(("to expect", recipe.name), rows)


def _print_summary(manifest: Manifest) -> None:
    from coral_cli.console import print_table

    last = manifest.facts["last"]
    names = [name for name in ("loss", "regression", "distill", "topk", "csra") if name in last]
    rows = [(name, f"{last[name]:.4f}") for name in names]
    rows += [(name.replace("_", " "), f"{last[name]:.1%}") for name in last if name.startswith("accuracy_")]
    if best := manifest.facts["best"]:
        rows.append((f"tokens per round, step {best['step']:,}", f"{best['tokens_per_round']:.3f}"))
    rows += [("tokens/s", f"{last['tokens_per_s']:,.0f}"), ("steps", f"{last['step']:,}")]
    rows.append(("mixed precision", manifest.recipe["train"]["precision"]))
    print_table(("training, last steps", manifest.recipe["train"]["preset"]), rows)
