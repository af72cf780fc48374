"""`coral group-head`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coral_cli.options import RUNS, Arguments, RunsOption, open_run

if TYPE_CHECKING:
    from coral_core.artifacts import Manifest


def group_head(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Group the LM head's rows and train the router."""
    from coral_cli.console import err, progress_bars
    from coral_core.training.grouping import group_head as build_head

    run = open_run(arguments, runs)
    with progress_bars() as progress:
        manifest, built = build_head(run.recipe, run.folder, progress)
    folder = run.folder / "head"
    if not built:
        err.print(f"{folder} is finished already, with this recipe and drafter", markup=False, soft_wrap=True)
    _print_summary(manifest)
    err.print(f"written to {folder}. Next: coral eval, coral chat", markup=False, soft_wrap=True)


def _print_summary(manifest: Manifest) -> None:
    from coral_cli.console import print_table

    facts = manifest.facts
    found = facts["recall"]
    rows = [
        ("groups (active)", f"{facts['groups']} ({facts['active']}), by {facts['clustering']}"),
        ("head rows read", f"{facts['rows_read']:,} of {facts['vocabulary']:,}"),
        ("recall of the target's argmax", f"{found['argmax']:.1%}"),
        ("recall of its ten best tokens", f"{found['top10']:.1%}"),
        ("probability mass read", f"{found['mass']:.1%}"),
        (f"full head, {facts['timed_rows']} rows", f"{facts['full_head_ms']:.2f} ms"),
        ("grouped head, router included", f"{facts['grouped_head_ms']:.2f} ms"),
    ]
    print_table(("head", f"on {facts['recall_rows']:,} held-out rows"), rows)
