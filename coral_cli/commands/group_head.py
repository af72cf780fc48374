"""`coral group-head`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, open_run
from coral_cli.tapped import Tapped

if TYPE_CHECKING:
    from coral_core.artifacts import Manifest


def group_head(arguments: Arguments = None, runs: RunsOption = RUNS) -> None:
    """Group the LM head's rows and train the router."""
    from coral_cli.console import progress_bars, tell
    from coral_core.bench.probe import Probe
    from coral_core.grouping.stage import group_head as build_head
    from coral_core.grouping.stage import head_standing

    with open_run(arguments, runs) as run:
        spec, folder = run.recipe.head, run.folder / "head"
        found = head_standing(run.recipe, run.folder)
        tell(hints.standing(folder, found, "recipe and drafter"))
        tapped = Tapped(run, "; or set head.groups and head.active")
        tapped.check()
        with progress_bars() as progress:
            is_open = not (spec.groups and spec.active) and not found.manifest
            prompts = tapped.prompts if is_open else []  # asked for first: the target takes long to load
            probe = Probe(run.recipe, tapped.target, prompts, progress) if is_open else None
            manifest, _ = build_head(run.recipe, run.folder, progress, probe, tapped.tap)
        _print_summary(manifest)
        tell(f"written to {folder}. Next: {hints.pasteable('coral eval')}")


def _print_summary(manifest: Manifest) -> None:
    from coral_cli.console import print_table, tell

    facts = manifest.facts
    settings = facts.get("settings") or [facts]
    read = ("groups, active", "rows read", "argmax", "top 10", "kept", "router ms", "head ms", "full ms")
    header = (*read, "tau", "round ms", "tokens/s", "vs full head")
    print_table(header, [_row(setting, facts) for setting in settings])
    predicted = all("speedup" in setting for setting in settings)
    for line in (
        "recall of the target's argmax and of its ten best tokens on "
        f"{facts['recall_rows']:,} held-out rows, and of the argmax where the full head drafts it (kept)",
        "* is what was built; tau to tokens/s are predicted from rounds with the full head, "
        "a head's ms from single calls with a cold cache, the router included",
        *(["- was not predicted, since head.groups and head.active were given"] if not predicted else []),
    ):
        tell(line, "dim")


def _row(setting: dict[str, Any], chosen: dict[str, Any]) -> tuple[str, ...]:
    found = setting["recall"]
    mark = " *" if all(setting[key] == chosen[key] for key in ("groups", "active")) else ""
    shown = [f"{found[key]:.1%}" if key in found else "-" for key in ("argmax", "top10", "kept")]
    shown += [f"{setting[key]:.2f}" if key in setting else "-" for key in ("router_ms", "head_ms", "full_head_ms")]
    predicted = ["-"] * 4
    if "speedup" in setting:
        predicted = [f"{setting['tokens_per_round']:.2f}", f"{setting['round_s'] * 1e3:.1f}"]
        predicted += [f"{setting['tokens_per_s']:.1f}", f"{setting['speedup']:.2f}x"]
    return (f"{setting['groups']}, {setting['active']}{mark}", f"{setting['rows_read']:,}", *shown, *predicted)
