"""EAGLE-2, HASS and CORAL from the same data and initial weights: in equal steps, in equal time, and choice by choice.

    coral prepare-data name=methods seed=7 data.holdout=200
    python -m benchmarks.methods name=methods seed=7 train.preset=drawn  # [RECIPE.YAML] [section.key=value ...]

Each row is one training and the tokens per round of its drafter (full head, greedy, EAGLE-2's tree) on held-out
prompts. Equal steps: the three methods after --steps and after --early-steps, all of their passes from the first step
on. Equal time: for each of --timed-steps, CORAL for so many steps in the form that the recipe gives it (its shape,
passes, losses and noise), HASS with its passes growing or drawn likewise, and EAGLE-2, each for as many steps as the
time allows; these two on EAGLE-2's shape. What a step costs is measured once, in turns in one process, and kept in
runs/NAME/methods/ (methods_time.py). All read the recipe's train.candidates. Then CORAL after --early-steps with one
choice changed.

A row is appended to runs/NAME/methods.jsonl when it is done, and never computed twice: an interrupted benchmark goes
on with the rows it was at, and its training where it was. Each training is a run of its own, runs/NAME/methods/KEY
(methods_bench.py). results/NAME.json (--record) is written anew after each. `--workers` rows are measured at a time,
each on its share of the cores. Rounds are found by replay (replay.py), which gives real decoding's number at a
fraction of its cost; the rows of seed 0 check that on the first prompts by real decoding.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.curve import curve
from benchmarks.methods_bench import PAPERS_TREE, Bench, Variant, open_bench
from benchmarks.methods_table import METHODS, Row, compare, shown
from benchmarks.methods_time import step_costs, timed, training_seconds
from benchmarks.record import record
from benchmarks.rows import append, read
from coral_cli.options import read_recipe
from coral_core.errors import CoralError
from coral_core.recipe.schema import PRESETS, Recipe, TrainSpec


def ablations(spec: TrainSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is varied around CORAL."""
    yield "candidates", {"candidates": 0 if spec.candidates else PRESETS["quick"]["candidates"]}
    yield from (("growth", {"unroll_growth": share}) for share in (0.5, 0.75))
    yield from (("top-K", {"topk_weight": weight}) for weight in (0.0, 1.0))
    yield "distillation alone", {"regression_weight": 0.0, "distill_weight": 1.0, "topk_weight": 0.0}
    yield from (("unroll", {"unroll_steps": steps}) for steps in (1, 2, 4, 5))
    yield from (("weight", {"csra_weight": weight}) for weight in (0.03, 0.3))
    yield "temperature", {"csra_temperature": 0.5}


class Rows:
    """The rows file: one JSON object per finished row, by key."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, {}
        for row in read(path):
            self.done[row.pop("key")] = row

    def keep(self, key: str, row: Row) -> None:
        """A row that is finished."""
        self.done[key] = row
        append(self.path, {"key": key, **row})

    def finished(self, bench: Bench, variants: Sequence[Variant]) -> list[Variant]:
        """Those of the variants whose rows are there."""
        return [variant for variant in variants if bench.key(variant) in self.done]

    def measured(self, bench: Bench, variants: Sequence[Variant], pool: ProcessPoolExecutor) -> Iterator[Row]:
        """The variants' rows in order; what was not measured before is measured now, several at a time."""
        missing = {bench.key(variant): variant for variant in variants if bench.key(variant) not in self.done}
        fresh = pool.map(_measure, missing.values())
        for variant in variants:
            key = bench.key(variant)
            if key not in self.done:
                self.keep(key, next(fresh))
            # One training may stand in two parts of the table: the preset's own n, or weight, is the main row.
            yield {**self.done[key], "part": variant.part, "name": variant.name}


_workers_own: list[Bench] = []
"""The bench of a worker process, opened once."""


def begin(threads: int, recipe: Recipe, run: Path, *asked: Any) -> None:
    """Open the bench of a worker process."""
    torch.set_num_threads(threads)
    _workers_own.append(open_bench(recipe, run, *asked))


def _measure(variant: Variant) -> Row:
    return _workers_own[0].measure(variant)


def run_rows(bench: Bench, rows: Rows, wanted: argparse.Namespace, pool: ProcessPoolExecutor) -> Iterator[list[Row]]:
    """All rows done so far, after each one, in the order of importance."""
    found: list[Row] = []
    costs = step_costs(bench) if wanted.timed_steps else {}
    main_seeds, ablation_seeds = range(wanted.seeds), range(wanted.ablation_seeds)

    def each(variants: list[Variant]) -> Iterator[list[Row]]:
        if wanted.finished:
            variants = rows.finished(bench, variants)
        for row in rows.measured(bench, variants, pool):
            found.append(row)
            yield found

    for steps in wanted.timed_steps:
        lasting = [variant for seed in main_seeds for variant in timed(bench, costs, steps, seed, wanted.timed_methods)]
        yield from each(lasting)
    for part, steps in (("methods", wanted.steps), ("early", wanted.early_steps)):
        if steps:
            yield from each([Variant(part, method, seed, steps) for seed in main_seeds for method in METHODS])
    varied = [(part, tuple(changes.items())) for part, changes in ablations(bench.recipe.train)]
    yield from each(
        [Variant(part, "coral", seed, wanted.early_steps, change) for part, change in varied for seed in ablation_seeds]
    )


def figures(bench: Bench, found: list[Row]) -> dict[str, Any]:
    """Equal steps; `early`; where times were compared, `equal_time` of the longest budget that is complete, all
    budgets, and what a step costs.

    Of three budgets and more, CORAL's curve over them too.
    """
    parts = [part for part in dict.fromkeys(row["part"] for row in found) if part.startswith("equal time")]
    costs = step_costs(bench) if parts else {}
    budgets = {}
    for part in sorted(parts, key=lambda part: int(part.split()[2])):
        compared = compare(found, part)
        if "coral" in compared.get("tau", {}):
            coral = next(row for row in found if (row["part"], row["name"]) == (part, "coral"))
            *_, variant = timed(bench, costs, coral["steps"], coral["seed"])
            seconds = training_seconds(bench.spec(variant), coral["seed"], costs)
            budgets[part.removeprefix("equal time, ")] = {"seconds": seconds, **compared}
    longest = [budget for budget in budgets.values() if "coral_over_eagle2" in budget][-1:] or [{}]
    equal_time: dict[str, Any] = {"equal_time": longest[0], "equal_time_budgets": budgets}
    if len(budgets) > 2:
        answers = answer_tokens_a_step(bench)
        steps = [int(name.split()[0]) for name in budgets]
        taus = [budget["tau"]["coral"] for budget in budgets.values()]
        equal_time["coral_curve"] = curve([round(answers * count) for count in steps], taus)
    early = {"early": compare(found, "early")}
    return compare(found, "methods") | early | (equal_time | {"step_s": costs} if parts else {})


def answer_tokens_a_step(bench: Bench) -> float:
    """What a training step reads of the target's answers, on the mean."""
    facts, spec = bench.store.manifest.facts, bench.recipe.train
    return float(facts["answer_tokens"] / facts["samples"] * spec.batch_size * spec.accumulate)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.YAML SECTION.KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablation-seeds", type=int, default=0, help="of each choice of CORAL; at most --seeds")
    parser.add_argument("--timed-steps", type=int, nargs="*", default=[400, 1600], help="of CORAL, in equal time")
    parser.add_argument("--timed-methods", nargs="*", default=METHODS, choices=METHODS, help="compared in equal time")
    parser.add_argument("--steps", type=int, default=1000, help="of the comparison in equal steps; 0 leaves it out")
    parser.add_argument("--early-steps", type=int, default=400, help="of an early one and of the choices; 0 likewise")
    parser.add_argument("--record", default="methods", metavar="NAME", help="the figures go to results/NAME.json")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--skip-prompts", type=int, default=0, help="held-out prompts on which a choice was made")
    parser.add_argument(
        "--feature-noise",
        type=float,
        help="of the methods as published; without it, and for CORAL in equal time, the recipe's",
    )
    parser.add_argument("--finished", action="store_true", help="tell of the rows that are there, and train none")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="tokens of a held-out answer")
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=workers, help="rows measured at a time; here %(default)s")
    options = parser.parse_args()
    if options.ablation_seeds > options.seeds:
        parser.error("--ablation-seeds compares with CORAL's row of the same seed: at most --seeds")
    return options


def main() -> None:
    options = parse()
    recipe = read_recipe(options.arguments)
    tree = dataclasses.replace(recipe.decode, **PAPERS_TREE, temperature=0.0, max_new_tokens=options.max_new_tokens)
    recipe = dataclasses.replace(recipe, decode=tree)
    run = options.runs / recipe.name
    threads = max(1, torch.get_num_threads() // options.workers)
    asked = options.prompts, options.skip_prompts, options.feature_noise
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin,
        initargs=(threads, recipe, run, *asked),
    )
    found: list[Row] = []
    try:
        bench = open_bench(recipe, run, *asked)
        for found in run_rows(bench, Rows(run / "methods.jsonl"), options, pool):
            newest = shown(found)[-1]
            print(f"{newest['part']} | {newest['name']} | seed {newest['seed']} | {newest['tau']:.3f}", flush=True)
            path = record(options.record, figures(bench, found), shown(found))
    except CoralError as error:
        sys.exit(f"error: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    if not found:
        sys.exit(f"error: {run}/methods.jsonl has no row of these. Leave --finished out to measure them")
    print(json.dumps(figures(bench, found), indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
