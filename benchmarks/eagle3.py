"""What EAGLE-3's shape is worth, step by step: each row changes one thing of the row before it.

    coral prepare-data recipes/smollm2-135m.yaml train.preset=eagle3      # taps the answers that are there already
    python -m benchmarks.eagle3 recipes/smollm2-135m.yaml train.candidates=6144

The rows have equal data, initial seed and number of optimizer steps; tokens per round are counted as in
benchmarks/methods.py, of which this uses the rows file: a row is never computed twice, and an interrupted benchmark
goes on where it was. What a step of each row costs is timed once, in turns on the same batch. The figure
`eagle3_over_eagle2_shape` compares the best of the EAGLE-3 rows with CORAL as it is today, `equal_time` both in the
time of the former.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.methods import PAPERS_TREE, Bench, Row, Rows, Variant, _begin, _step_seconds, counts, open_bench
from benchmarks.paired import ratio, ratio_ci95, tau, tau_ci95
from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.artifacts import fingerprint, write_text
from coral_core.training.loop import make_accelerator
from coral_core.training.trainer import Trainer

TURNS = 5
WORDS: dict[str, Any] = {"regression_weight": 0.0, "distill_weight": 1.0, "topk_weight": 0.0, "csra_weight": 0.0}
THROUGH: dict[str, Any] = {**WORDS, "through_steps": True, "step_decay": 0.8, "feature_noise": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "a coral today": {},
    "b words alone": {**WORDS, "csra_weight": 0.1},
    "c gradients through the steps": {**THROUGH, "csra_weight": 0.1},
    "d three layers, EAGLE-3's body": {**THROUGH, "shape": "eagle3"},
    "e d with alignment": {**THROUGH, "shape": "eagle3", "csra_weight": 0.1},
    "g e with EAGLE-3.1's norms": {**THROUGH, "shape": "eagle3.1", "csra_weight": 0.1},
}
"""Row -> keys of the recipe's train section that differ from the preset coral."""
WIDE = [name for name, keys in ROWS.items() if "shape" in keys]
TODAY = next(iter(ROWS))


def variant(name: str, seed: int, steps: int) -> Variant:
    """One training, all of its passes from the first step on."""
    return Variant("shape", "coral", seed, steps, tuple({"unroll_growth": 0.0, **ROWS[name]}.items()))


def step_seconds(bench: Bench) -> dict[str, float]:
    """Seconds of a step of each row, the least of TURNS, measured once and kept beside the rows."""
    specs = {name: bench.spec(variant(name, 0, 1)) for name in ROWS}
    what = [bench.store.manifest.fingerprint, [dataclasses.asdict(spec) for spec in specs.values()]]
    path = bench.run / "methods" / f"eagle3-costs-{fingerprint(what)}.json"
    if not path.exists():
        accelerator = make_accelerator(bench.recipe.train, bench.run / "methods")
        trainers = {name: Trainer(spec, bench.store, 0, accelerator) for name, spec in specs.items()}
        micro = next(trainers[TODAY].micro_batches())
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(TURNS):
            for name, trainer in trainers.items():
                times[name].append(_step_seconds(trainer, micro))
        write_text(path, json.dumps({name: min(seconds) for name, seconds in times.items()}, indent=1) + "\n")
    costs: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return costs


def run_rows(bench: Bench, rows: Rows, wanted: argparse.Namespace, pool: ProcessPoolExecutor) -> Iterator[list[Row]]:
    """All rows done so far, after each one: seed by seed, then CORAL in the time of the best EAGLE-3 row."""
    found: list[Row] = []
    for seed in range(wanted.seeds):
        variants = [variant(name, seed, wanted.steps) for name in ROWS]
        for name, row in zip(ROWS, rows.measured(bench, variants, pool), strict=True):
            found.append(row | {"name": name})
            yield found
    costs, best = step_seconds(bench), best_row(found)
    steps = round(wanted.steps * costs[best] / costs[TODAY])
    variants = [dataclasses.replace(variant(TODAY, seed, steps), part="equal time") for seed in range(wanted.seeds)]
    for row in rows.measured(bench, variants, pool):
        found.append(row | {"name": TODAY})
        yield found


def best_row(found: list[Row]) -> str:
    """The EAGLE-3 row with the most tokens per round, of the seeds that are done."""
    done = [name for name in WIDE if seeds(found, name)]
    return max(done, key=lambda name: tau(counts(found, "shape", name, seeds(found, name))))


def seeds(found: list[Row], name: str, part: str = "shape") -> list[int]:
    return sorted(row["seed"] for row in found if (row["part"], row["name"]) == (part, name))


def compared(found: list[Row], first: str, second: str, part: str = "shape") -> tuple[float, list[float]] | None:
    """tau of `first` over that of `second` (of another part, where one is named), and its interval."""
    shared = sorted({*seeds(found, first)} & {*seeds(found, second, part)})
    if not shared:
        return None
    pair = counts(found, "shape", first, shared), counts(found, part, second, shared)
    return ratio(*pair), ratio_ci95(*pair)


def figures(bench: Bench, found: list[Row]) -> dict[str, Any]:
    """The ratios that the rows give so far."""
    told: dict[str, Any] = {"step_s": step_seconds(bench)}
    if not any(seeds(found, name) for name in WIDE):
        return told
    best = best_row(found)
    pairs = {
        "eagle3_over_eagle2_shape": compared(found, best, TODAY),
        "csra_on_eagle3": compared(found, "e d with alignment", "d three layers, EAGLE-3's body"),
        "eagle3_over_eagle2_shape_equal_time": compared(found, best, TODAY, "equal time"),
    }
    for name, pair in pairs.items():
        if pair is not None:
            told |= {name: pair[0], f"{name}_ci95": pair[1]}
    return told | {"best": best}


def shown(found: list[Row]) -> list[Row]:
    """Rows for the results: counts summed over prompts."""
    table = []
    for row in found:
        own = counts([row], row["part"], row["name"], [row["seed"]])
        line = {key: value for key, value in row.items() if key not in ("tokens", "rounds")}
        table.append(line | {"tau": tau(own), "tau_ci95": tau_ci95(own)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.YAML SECTION.KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--record", default="eagle3", metavar="NAME", help="the figures go to results/NAME.json")
    wanted = parser.parse_args()
    recipe = read_recipe(wanted.arguments)
    tree = dataclasses.replace(recipe.decode, **PAPERS_TREE, temperature=0.0, max_new_tokens=48)
    recipe = dataclasses.replace(recipe, decode=tree)
    run = wanted.runs / recipe.name
    bench = open_bench(recipe, run, wanted.prompts)
    begun_s = time.perf_counter()
    with ProcessPoolExecutor(1, initializer=_begin, initargs=(recipe, run, wanted.prompts, 1)) as pool:
        for found in run_rows(bench, Rows(run / "methods.jsonl"), wanted, pool):
            record(wanted.record, figures(bench, found), shown(found))
            spent_min = (time.perf_counter() - begun_s) / 60
            print(f"{found[-1]['name']}: {len(found)} rows, {spent_min:.0f} min", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
