"""`coral eval`: plain and speculative decoding of the same questions, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coral_cli.options import RUNS, Arguments, Run, RunsOption, open_run

if TYPE_CHECKING:
    from coral_core.bench.evaluate import Bench


def evaluate(
    arguments: Arguments = None,
    bench: Annotated[
        list[str] | None,
        typer.Option("--bench", help="mt-bench, humaneval, gsm8k or held-out (the default); repeat for several."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="JSONL file with the questions of the one --bench, or of your own."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each bench, at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Measure tokens per round and speed against plain decoding, and check that not a word differs."""
    from coral_cli.console import err, print_json, progress_bars
    from coral_core.bench.evaluate import evaluate as run_evaluation
    from coral_core.bench.questions import HELD_OUT, check_bench
    from coral_core.decoding.assemble import assemble
    from coral_core.target.load import load_target

    names = [name if questions else check_bench(name) for name in bench or []]
    if questions and len(names) > 1:
        raise typer.BadParameter("--questions goes with one --bench")
    run = open_run(arguments, runs)
    target = load_target(run.recipe.target)
    assembled = assemble(run.recipe, run.folder, target)
    err.print(f"drafter and head from {assembled.folder}", markup=False, soft_wrap=True)
    benches = [_load(name, questions, limit, run) for name in names or [questions.stem if questions else HELD_OUT]]
    with progress_bars() as progress:
        results = run_evaluation(run.recipe, run.folder, assembled, benches, progress)
    if as_json:
        print_json(results)
    else:
        _print_report(results)
    err.print(f"written to {run.folder / 'eval' / 'results.json'}", markup=False, soft_wrap=True)


def _load(name: str, file: Path | None, limit: int | None, run: Run) -> Bench:
    from coral_core.bench.evaluate import Bench
    from coral_core.bench.questions import HELD_OUT, from_file, from_hub, held_out

    if file:
        found = from_file(file)
    elif name == HELD_OUT:
        found = held_out(run.folder, run.recipe.target.model)
    else:
        found = from_hub(name)
    return Bench(name, found[:limit])


def _print_report(results: dict[str, Any]) -> None:
    from coral_cli.console import out, print_table
    from coral_core.bench.metrics import DEFINITIONS

    header = ("bench", "questions", "tau micro", "tau macro", "tokens/s", "plain tokens/s", "speedup", "lossless")
    rows = []
    for name, numbers in results["benches"].items():
        interval = numbers["speedup_ci95"]
        spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        lossless = numbers["lossless"]
        rows.append(
            (
                name,
                str(numbers["questions"]),
                *(_number(numbers[f"tokens_per_round_{kind}"]) for kind in ("micro", "macro")),
                _number(numbers["tokens_per_s"], 1),
                f"{_number(numbers['baseline_tokens_per_s'], 1)} ({numbers['baseline']})",
                _number(numbers["speedup"]) + "x" + spread,
                f"{lossless['equal']}/{lossless['checked']}",
            )
        )
    print_table(header, rows)
    out.print()
    for line in DEFINITIONS:
        out.print(line, style="dim", markup=False, soft_wrap=True)
    tried = ", ".join(f"{name} {speed:.1f}" for name, speed in results["plain_decoders"].items())
    out.print(f"plain decoders tried, tokens/s: {tried}; the fastest is the baseline.", style="dim", soft_wrap=True)
    for name, numbers in results["benches"].items():
        if first := numbers["lossless"]["first_divergence"]:
            out.print(f"{name}: first difference {first} (dtype {results['dtype']})", markup=False, soft_wrap=True)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
