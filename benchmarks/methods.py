"""EAGLE-2, HASS and CORAL from the same data, weights and steps, early, and in equal time; what each choice is worth.

    coral prepare-data name=methods data.holdout=200
    python -m benchmarks.methods name=methods      # [RECIPE.YAML] [section.key=value ...], as every command takes them

Each row is one training and the tokens per round of its drafter (full head, greedy, EAGLE-2's tree) on held-out
prompts: of the three methods after --steps, in the time that CORAL takes for them, and after --early-steps; then of
CORAL after --early-steps with one choice changed. A row is appended to runs/NAME/methods.jsonl when it is done, and
never computed twice: an interrupted benchmark goes on with the rows it was at. Rows come in the order of importance,
and results/methods.json is written anew after each. `--workers` rows are measured at a time, each on its share of the
cores: two trainings of pico on one core each are faster than one after the other on two. Rounds are found by replay
(benchmarks/replay.py), which gives real decoding's number at a fraction of its cost; the rows of seed 0 check that on
the first prompts by real decoding.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import replay
from benchmarks.paired import Counts, ratio, ratio_ci95, tau, tau_ci95
from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.artifacts import fingerprint, write_text
from coral_core.bench.acceptance import emitted_by_prompt
from coral_core.decoding.engine import Engine
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, CoralError
from coral_core.head.full import FullHead
from coral_core.recipe.schema import PRESETS, Recipe
from coral_core.run import sampler, tree_shape
from coral_core.store.store import Store
from coral_core.target.capture import tap
from coral_core.target.load import Target, load_target
from coral_core.training.loop import Reports, train
from coral_core.training.stage import open_data

METHODS = ("eagle2", "hass", "coral")
COMPARISONS = ("methods", "equal time", "early")
"""Parts that measure all three; the others change one choice of CORAL."""
PAPERS_TREE: dict[str, Any] = {
    "tree": "fixed",
    "draft_depth": 6,
    "draft_nodes": 60,
    "draft_topk": 10,
    "draft_confidence": 0.0,
}
"""EAGLE-2's, on which HASS and CORAL are compared too. A CPU's small trees, cut at a confidence, rarely reach the
depths that the unroll trains: on pico's own (10 nodes, 0.05), seed 0, HASS was 1.006 times EAGLE-2."""
CHECKED = 10
"""Prompts on which a replay is compared with real decoding, in the rows that are compared."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training: a preset, the keys that differ from it, and a seed."""

    part: str
    preset: str
    seed: int
    steps: int
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As the table calls it."""
        return " ".join([self.preset, *(f"{key}={value}" for key, value in self.changes)])


def ablations() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is varied around CORAL. CSRA's other choices were searched at the temperature that was the default then."""
    yield "target feature", {"csra_include_target": True}
    yield from (("top-K", {"topk_weight": weight}) for weight in (0.0, 1.0))
    yield from (("unroll", {"unroll_steps": steps}) for steps in (1, 2, 4, 5))
    yield "temperature", {"csra_temperature": 0.5}
    yield from (
        ("weight", {"csra_weight": weight, "csra_temperature": temperature})
        for weight in (0.03, 0.3)
        for temperature in (0.2, 0.5)
    )
    searched: list[tuple[str, dict[str, Any]]] = [
        ("temperature", {}),
        ("weight", {"csra_weight": 0.03}),
        ("weight", {"csra_weight": 0.3}),
        ("target feature", {"csra_include_target": True}),
        ("gradient side", {"csra_gradient": "query"}),
        ("false negatives", {"csra_mask_same_token": True}),
    ]
    yield from ((part, {**changes, "csra_temperature": 0.07}) for part, changes in searched)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share."""

    recipe: Recipe
    run: Path
    store: Store
    target: Target
    prompts: list[list[int]]
    repeating: list[Target]

    def spec(self, variant: Variant) -> Any:
        """The recipe's training with a preset's keys, then the variant's."""
        steps = variant.steps
        fixed = {"preset": variant.preset, "steps": steps, "eval_every": 0, "checkpoint_every": steps + 1}
        return dataclasses.replace(self.recipe.train, **{**PRESETS[variant.preset], **fixed, **dict(variant.changes)})

    def key(self, variant: Variant) -> str:
        """Everything that decides a row's numbers."""
        train_keys = dataclasses.asdict(self.spec(variant))
        del train_keys["preset"]
        data, tree = self.store.manifest.fingerprint, dataclasses.asdict(self.recipe.decode)
        return fingerprint([data, self.target.fingerprint, tree, len(self.prompts), variant.seed, train_keys])

    def measure(self, variant: Variant) -> Row:
        """Train, and count tokens and rounds on every prompt."""
        begun_s = time.perf_counter()
        spec = self.spec(variant)
        lines: list[dict[str, Any]] = []
        reports = Reports(lines.append, progress_line(variant))
        work = self.run / "methods" / self.key(variant)
        drafter = train(spec, self.store, seed=variant.seed, work=work, reports=reports)
        emitted = [
            self.decode(target, drafter, [prompt])[0]
            for target, prompt in zip(self.repeating, self.prompts, strict=True)
        ]
        row = {
            "part": variant.part,
            "name": variant.name,
            "seed": variant.seed,
            "steps": spec.steps,
            "train_s": lines[-1]["elapsed_s"],
            "row_s": time.perf_counter() - begun_s,
            "last": {key: value for key, value in lines[-1].items() if key.startswith(("loss", "accuracy", "cosine"))},
            "tokens": [sum(rounds) for rounds in emitted],
            "rounds": [len(rounds) for rounds in emitted],
        }
        if variant.part == "methods" and variant.seed == 0:
            decoded = self.decode(self.target, drafter, self.prompts[:CHECKED])
            row["decoded_alike"] = [sum(a == b for a, b in zip(decoded, emitted, strict=False)), len(decoded)]
        return row

    def decode(self, target: Target, drafter: Drafter, prompts: list[list[int]]) -> list[list[int]]:
        """Tokens of each round, for each prompt, with the full head."""
        drafter = drafter.to(target.device, target.dtype)
        engine = Engine(target, drafter, FullHead(target.lent), tree_shape(self.recipe.decode))
        return list(emitted_by_prompt(engine, prompts, sampler(self.recipe), self.recipe.decode.max_new_tokens))


def progress_line(variant: Variant) -> Any:
    """A line on stderr now and then: this runs unattended."""

    def show(_stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if total and done and done % max(1, total // 4) == 0:
            loss = f", loss {numbers['loss']:.3f}" if "loss" in numbers else ""
            print(f"  {variant.name}, seed {variant.seed}: step {done} of {total}{loss}", file=sys.stderr, flush=True)

    return show


def open_bench(recipe: Recipe, run: Path, prompts: int) -> Bench:
    """Data, target, and the target's own answers to the held-out prompts, which are kept for the next time."""
    target = load_target(recipe.target)
    store = open_data(recipe, run, lambda ids_BT, valid_BT: tap(target, ids_BT, valid_BT).feature_BTD)
    if store.manifest.inputs["target"] != target.fingerprint:
        raise ArtifactError(f"{store.folder} was made with another target. Run: coral prepare-data")
    held = store.holdout_prompts
    if len(held) < prompts:
        raise ArtifactError(
            f"{store.folder} holds {len(held)} held-out prompts of the {prompts} wanted. "
            f"Run coral prepare-data with data.holdout={prompts}, or lower --prompts"
        )
    chosen = held[:prompts]
    folder = run / "methods"
    folder.mkdir(exist_ok=True)
    settings = [target.fingerprint, chosen, dataclasses.asdict(recipe.decode), recipe.seed]
    path = folder / f"answers-{fingerprint(settings)}.json"
    if not path.exists():
        print(f"{prompts} plain answers, once", file=sys.stderr, flush=True)
        made = list(replay.plain_answers(target, chosen, sampler(recipe), recipe.decode.max_new_tokens))
        write_text(path, json.dumps(made) + "\n")
    repeating = [replay.repeating(target, p, a) for p, a in zip(chosen, json.loads(path.read_text()), strict=True)]
    return Bench(recipe, run, store, target, chosen, repeating)


class Rows:
    """The rows file: one JSON object per finished row, by key."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            self.done[row.pop("key")] = row

    def measured(self, bench: Bench, variants: Sequence[Variant], pool: ProcessPoolExecutor) -> Iterator[Row]:
        """The variants' rows in order; what was not measured before is measured now, several at a time."""
        missing = {bench.key(variant): variant for variant in variants if bench.key(variant) not in self.done}
        fresh = pool.map(_measure, missing.values())
        for variant in variants:
            key = bench.key(variant)
            if key not in self.done:
                self.done[key] = next(fresh)
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, **self.done[key]}) + "\n")
            # One training may stand in two parts of the table: the preset's own n, or weight, is the main row.
            yield {**self.done[key], "part": variant.part, "name": variant.name}


_workers_own: list[Bench] = []
"""The bench of a worker process, opened once."""


def _begin(recipe: Recipe, run: Path, prompts: int, threads: int) -> None:
    torch.set_num_threads(threads)
    _workers_own.append(open_bench(recipe, run, prompts))


def _measure(variant: Variant) -> Row:
    return _workers_own[0].measure(variant)


def run_rows(
    bench: Bench, rows: Rows, seeds: tuple[int, int], early_steps: int, pool: ProcessPoolExecutor
) -> Iterator[list[Row]]:
    """All rows done so far, after each one; `seeds` are how many of the comparisons and of the ablations."""
    found: list[Row] = []
    main_seeds, ablation_seeds = map(range, seeds)
    steps = bench.recipe.train.steps

    def each(variants: list[Variant]) -> Iterator[list[Row]]:
        for row in rows.measured(bench, variants, pool):
            found.append(row)
            yield found

    yield from each([Variant("methods", method, seed, steps) for seed in main_seeds for method in METHODS])
    # The fastest of the seeds: a neighbour on the machine only ever adds time.
    fastest_s = {m: min(row["train_s"] for row in found if row["name"] == m) for m in METHODS}
    afforded = {m: round(steps * round(fastest_s["coral"] / fastest_s[m], 2)) for m in METHODS}
    yield from each([Variant("equal time", m, seed, afforded[m]) for seed in main_seeds for m in METHODS])
    yield from each([Variant("early", method, seed, early_steps) for seed in main_seeds for method in METHODS])
    varied = [(part, tuple(changes.items())) for part, changes in ablations()]
    yield from each(
        [Variant(part, "coral", seed, early_steps, changes) for part, changes in varied for seed in ablation_seeds]
    )


def counts(found: list[Row], part: str, name: str, seeds: list[int]) -> Counts:
    """(tokens_SP, rounds_SP) of a method's rows, in the order of `seeds`."""
    by_seed = {row["seed"]: row for row in found if (row["part"], row["name"]) == (part, name)}
    tokens_SP, rounds_SP = (np.array([by_seed[seed][what] for seed in seeds], float) for what in ("tokens", "rounds"))
    return tokens_SP, rounds_SP


def complete_seeds(found: list[Row], part: str) -> list[int]:
    """Seeds of which every method's row is there."""
    seen = {(row["name"], row["seed"]) for row in found if row["part"] == part}
    return sorted(seed for seed in {seed for _, seed in seen} if all((method, seed) in seen for method in METHODS))


def compare(found: list[Row], part: str) -> dict[str, Any]:
    """The figures of one comparison of the three methods."""
    seeds = complete_seeds(found, part)
    if not seeds:
        return {}
    eagle2, hass, coral = (counts(found, part, method, seeds) for method in METHODS)
    return {
        "tau": {method: tau(counts(found, part, method, seeds)) for method in METHODS},
        "tau_ci95": {method: tau_ci95(counts(found, part, method, seeds)) for method in METHODS},
        "hass_over_eagle2": ratio(hass, eagle2),
        "hass_over_eagle2_ci95": ratio_ci95(hass, eagle2),
        "coral_over_hass": ratio(coral, hass),
        "coral_over_hass_ci95": ratio_ci95(coral, hass),
        "seeds": len(seeds),
        "prompts": hass[0].shape[1],
    }


def shown(found: list[Row]) -> list[Row]:
    """Rows for the results: counts summed over prompts, and an ablation's ratio to CORAL's early row of its seed."""
    table = []
    for row in found:
        own = counts([row], row["part"], row["name"], [row["seed"]])
        line = {key: value for key, value in row.items() if key not in ("tokens", "rounds")}
        line |= {"tokens": sum(row["tokens"]), "rounds": sum(row["rounds"]), "tau": tau(own), "tau_ci95": tau_ci95(own)}
        if row["part"] not in COMPARISONS:
            coral = counts(found, "early", "coral", [row["seed"]])
            line |= {"over_coral": ratio(own, coral), "over_coral_ci95": ratio_ci95(own, coral)}
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.YAML SECTION.KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablation-seeds", type=int, default=1, help="at most --seeds; 0 leaves the ablations out")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the comparison")
    parser.add_argument("--early-steps", type=int, default=400, help="of an early one, and of the ablations")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=48, help="tokens of a held-out answer")
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=workers, help="rows measured at a time; here %(default)s")
    options = parser.parse_args()
    if options.ablation_seeds > options.seeds:
        parser.error("--ablation-seeds compares with CORAL's row of the same seed: at most --seeds")
    recipe = read_recipe(options.arguments)
    recipe = dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, steps=options.steps),
        decode=dataclasses.replace(
            recipe.decode, **PAPERS_TREE, temperature=0.0, max_new_tokens=options.max_new_tokens
        ),
    )
    run = options.runs / recipe.name
    threads = max(1, torch.get_num_threads() // options.workers)
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(recipe, run, options.prompts, threads),
    )
    try:
        bench = open_bench(recipe, run, options.prompts)
        seeds = (options.seeds, options.ablation_seeds)
        for found in run_rows(bench, Rows(run / "methods.jsonl"), seeds, options.early_steps, pool):
            newest = shown(found)[-1]
            print(f"{newest['part']} | {newest['name']} | seed {newest['seed']} | {newest['tau']:.3f}", flush=True)
            figures = compare(found, "methods")
            figures |= {part.replace(" ", "_"): compare(found, part) for part in COMPARISONS[1:]}
            path = record("methods", figures, shown(found))
    except CoralError as error:
        sys.exit(f"error: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    print(json.dumps(figures, indent=1), path, sep="\n")


if __name__ == "__main__":
    main()
