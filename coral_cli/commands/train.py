"""`coral train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coral_cli.options import RUNS, Arguments, RunsOption, open_run

if TYPE_CHECKING:
    from coral_core.artifacts import Manifest


def train(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Train the drafter on the tapped features."""
    from coral_cli.console import err, progress_bars
    from coral_core.training.publish import train_drafter

    run = open_run(arguments, runs)
    with progress_bars() as progress:
        manifest, trained = train_drafter(run.recipe, run.folder, progress)
    folder = run.folder / "drafter"
    if not trained:
        err.print(f"{folder} is finished already, with this recipe and data", markup=False, soft_wrap=True)
    _print_summary(manifest)
    err.print(f"written to {folder}. Next: coral group-head", markup=False, soft_wrap=True)


def _print_summary(manifest: Manifest) -> None:
    from coral_cli.console import print_table

    last = manifest.facts["last"]
    names = [name for name in ("loss", "regression", "distill", "topk", "csra") if name in last]
    rows = [(name, f"{last[name]:.4f}") for name in names]
    rows += [(name.replace("_", " "), f"{last[name]:.1%}") for name in last if name.startswith("accuracy_")]
    rows += [("tokens/s", f"{last['tokens_per_s']:,.0f}"), ("steps", f"{last['step']:,}")]
    print_table(("training, last steps", manifest.recipe["train"]["preset"]), rows)
