"""`coral eval`: plain and speculative decoding of the same questions, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coral_cli import hints
from coral_cli.options import RUNS, Arguments, RunsOption, drafter_from, open_run, read_recipe


def evaluate(  # noqa: PLR0913  # one parameter per option
    arguments: Arguments = None,
    bench: Annotated[
        list[str] | None,
        typer.Option(
            "--bench", help="held-out (the default), mt-bench, humaneval, gsm8k, math-500 ...; repeat for several."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="JSONL file with the questions, or a folder with BENCH.jsonl for each bench."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each bench, at most.")] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option("--drafter", help="A run's name or folder, to use its drafter; repeat to compare."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option("--head", help="grouped, full or static; repeat to compare.")
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run HumanEval's answers for pass@1, in a subprocess with limits: no guard against malicious code.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Measure tokens per round and speed against plain decoding, and check that not a word differs."""
    from coral_cli.console import print_json, print_markdown, progress_bars, tell
    from coral_core.bench.contenders import contenders
    from coral_core.bench.questions import HELD_OUT, Bench, check_names, load_bench

    recipe = read_recipe(arguments)
    names = check_names(bench or [], questions)
    compared = contenders(recipe, runs / recipe.name, drafter or [], head or [])
    found = [load_bench(name, questions, runs / recipe.name, recipe.target.model) for name in names]

    from coral_core.bench.evaluate import Plan, interrupted  # torch, seconds: a slip above is answered before
    from coral_core.bench.evaluate import evaluate as run_evaluation
    from coral_core.bench.methods import learnt_elsewhere, load_method
    from coral_core.report.tables import markdown
    from coral_core.run import Run

    with open_run(arguments, runs) as run:
        for contender in compared:
            Run(contender.recipe, contender.folder).refuse_unmade()
        target = run.target(dialogues=any(not one.ids for bench in found for one in bench.questions))
        methods = [load_method(contender, target) for contender in compared]
        for folder in dict.fromkeys(method.folder for method in methods):
            tell(hints.pasteable(drafter_from(folder, run)))
        for method in methods if HELD_OUT in names else ():
            tell(hints.pasteable(learnt_elsewhere(method, run.folder)))
        plan = Plan(
            recipe=recipe,
            target=target,
            methods=methods,
            benches=[Bench(one.name, one.questions[:limit]) for one in found],
            run_code=run_code,
        )
        tell(interrupted(plan, run.folder))
        with progress_bars() as progress:
            results = run_evaluation(plan, run.folder, progress)
        if as_json:
            print_json(results)
        else:
            print_markdown(markdown(results))
        tell(f"written to {run.folder / 'eval'}: results.json, results.md, results.tex")
        tell(f"to look at: {run.folder / 'eval' / 'report.html'}")
