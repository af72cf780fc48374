"""`coral prepare-data`: prompts, the target's answers, and its features, into one store."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, open_run, read_recipe

if TYPE_CHECKING:
    from coral_core.data.job import Job, Standing
    from coral_core.store.store import Store


def prepare_data(
    arguments: Arguments = None,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print so many dialogues; what the target wrote is coloured.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the tokens, bytes and time to expect; make nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop unfinished data, of other settings too, and begin anew.")
    ] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Let the target answer the prompts, and tap its features."""
    from coral_cli.console import progress_bars, tell
    from coral_core.artifacts import drop_unfinished
    from coral_core.data.estimate import estimate
    from coral_core.data.job import Job, check_recipe, standing
    from coral_core.data.stage import prepare
    from coral_core.processes import agreed, processes
    from coral_core.target.load import load_target

    check_recipe(read_recipe(arguments))
    main = processes().is_main_process
    with open_run(arguments, runs, main=main and not dry_run) as run:
        key = os.environ.get("CORAL_ENDPOINT_KEY", "")
        target = load_target(run.recipe.target, dialogues=True)
        target = dataclasses.replace(target, exact=False)  # not compared with others; 11 to 20 % faster (SmolLM2)
        job = Job(run.recipe, target, run.folder / "data", key)
        if restart and main and not dry_run:
            drop_unfinished(job.folder)
        found = agreed(lambda: standing(job))
        if not main:
            if not dry_run and found.store is None:
                prepare(job)
            return
        tell(_standing_text(job, found))
        if dry_run:
            with progress_bars() as progress:
                _print_estimate(job, estimate(job, progress))
            return
        store = found.store
        if store is None:
            with progress_bars() as progress:
                store = prepare(job, progress)
        _print_summary(store)
        for index in store.train_indices[:show]:
            _print_sample(store, index, job.target.tokenizer)
        tell(hints.pasteable(f"in {job.folder}. Next: coral train"))


def _standing_text(job: Job, found: Standing) -> str:
    from coral_core.artifacts import MANIFEST

    if found.store is not None:
        return f"{job.folder} is finished already, with this recipe and target"
    if found.words:
        return f"the answers in {job.folder} are kept; they are tapped anew, since {'; '.join(found.changed)}"
    if found.count:
        return f"what {job.folder} shares with the new data is kept: {'; '.join(found.changed)}"
    if found.changed:
        return f"{job.folder} is made anew, and replaced at the end, since {'; '.join(found.changed)}"
    if MANIFEST in found.damaged:
        return f"{job.folder} is made anew, and replaced at the end, since its {MANIFEST} is damaged or missing"
    if found.damaged:
        return f"{job.folder} is damaged ({', '.join(found.damaged)}); what is whole is kept, the rest is made again"
    return ""


def _print_estimate(job: Job, expected: Any) -> None:
    from coral_cli.console import duration_text, print_table, size_text

    rows = [
        ("dialogues", f"{expected.dialogues:,}"),
        ("tokens", f"{expected.tokens:,}"),
        ("tokens to write", f"{expected.written_tokens:,}"),
        ("size", size_text(expected.size_bytes)),
        ("time besides the server's" if job.recipe.data.endpoint else "time", duration_text(expected.elapsed_s)),
    ]
    print_table(("to expect, at most", job.recipe.name), rows)


def _print_summary(store: Store) -> None:
    from coral_cli.console import print_table, size_text

    facts = store.manifest.facts
    rows = [
        ("dialogues", f"{facts['dialogues']:,}"),
        ("of them held out", f"{facts['holdout_dialogues']:,}"),
        ("tokens", f"{facts['tokens']:,}"),
        ("answer tokens", f"{facts['answer_tokens']:,}"),
        *_cut(store),
        ("size", size_text(facts["bytes"])),
        *((f"from {name}", f"{count:,}") for name, count in facts["sources"].items() if len(facts["sources"]) > 1),
        *((f"left out: {reason}", f"{count:,}") for reason, count in facts["skipped"].items()),
        *((f"field not read: {name}", f"{count:,}") for name, count in facts.get("unread", {}).items()),
    ]
    print_table(("data", store.folder.parent.name), rows)


def _cut(store: Store) -> list[tuple[str, str]]:
    """How many dialogues end before their last answer does: of a model that thinks first, they may be nearly all."""
    cut, spec = store.manifest.facts.get("cut_samples"), store.manifest.recipe["data"]
    if not cut:
        return []
    limits = f"data.max_length={spec['max_length']}"
    if spec["regenerate"] != "none":
        limits = f"data.max_new_tokens={spec['max_new_tokens']} or {limits}"
    return [(f"last answer cut at {limits}", f"{cut:,} ({cut / store.manifest.facts['samples']:.0%})")]


def _print_sample(store: Store, index: int, tokenizer: Any) -> None:
    """One dialogue as the drafter learns it; ⟦ ⟧ stand for the colour where there is none."""
    from itertools import groupby

    from rich.text import Text

    from coral_cli.console import out

    sample = store[index]
    text = Text(f"--- sample {index}: {len(sample.ids_T)} tokens, {int(sample.answer_T.sum())} of them the target's\n")
    pairs = zip(sample.ids_T.tolist(), sample.answer_T.tolist(), strict=True)
    for answer, run in groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in run])
        text.append(words if not answer or out.is_terminal else f"⟦{words}⟧", style="bold green" if answer else "dim")
    out.print(text, soft_wrap=True)
