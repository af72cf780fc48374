"""EAGLE-2, HASS and CORAL from the same data and initial weights: in equal steps, in equal time, and choice by choice.

    coral prepare-data name=methods seed=7 data.holdout=200
    python -m benchmarks.methods name=methods seed=7 train.preset=drawn  # [RECIPE.YAML] [section.key=value ...]

Each row is one training and the tokens per round of its drafter (full head, greedy, EAGLE-2's tree) on held-out
prompts. Equal steps: the three methods after --steps and after --early-steps, all of their passes from the first step
on. Equal time: for each of --timed-steps, CORAL for so many steps in the form that the recipe gives it (its shape,
passes, losses and noise), HASS with its passes growing or drawn likewise, and EAGLE-2, each for as many steps as the
time allows; these two on EAGLE-2's shape.
What a step costs is measured once, in turns in one process, and kept in runs/NAME/methods/. All read the recipe's
train.candidates.
Then CORAL after --early-steps with one choice changed.

A row is appended to runs/NAME/methods.jsonl when it is done, and never computed twice: an interrupted benchmark goes
on with the rows it was at, and its training where it was. Each training is a run of its own, runs/NAME/methods/KEY.
results/NAME.json (--record) is written anew after each. `--workers` rows are measured at a time, each on its share of
the cores. Rounds are found by replay (benchmarks/replay.py), which gives real decoding's
number at a fraction of its cost; the rows of seed 0 check that on the first prompts by real decoding.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import replay
from benchmarks.clock import busy_s
from benchmarks.curve import curve
from benchmarks.methods_table import METHODS, Row, compare, is_comparison, shown
from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.artifacts import fingerprint, write_text
from coral_core.bench.acceptance import emitted_by_prompt
from coral_core.bench.metrics import accepted_by_depth
from coral_core.decoding.engine import Engine
from coral_core.drafter.load import load_drafter
from coral_core.drafter.model import Drafter
from coral_core.errors import ArtifactError, CoralError
from coral_core.head.heads import FullHead
from coral_core.recipe.loader import dump_yaml
from coral_core.recipe.schema import PRESETS, UNSET, Recipe, TrainSpec
from coral_core.run import sampler, tree_shape
from coral_core.store.store import Store
from coral_core.target.capture import tap
from coral_core.target.load import load_target
from coral_core.target.target import Target
from coral_core.training.loop import CLIP_NORM, make_accelerator
from coral_core.training.stage import open_data, train_drafter
from coral_core.training.trainer import MicroBatch, Trainer, unroll_steps

AS_PUBLISHED: dict[str, Any] = {key: value for key, value in UNSET.items() if key != "feature_noise"}
"""What the three methods take for these keys, whatever the recipe says."""
PASSES = ("unroll_growth", "unroll_drawn")
WEIGHTS = ("step_decay", "regression_weight", "distill_weight", "topk_weight", "csra_weight")
FORM = ("shape", "through_steps", "unroll_steps", "feature_noise", *PASSES, *WEIGHTS)
"""The keys that CORAL takes from the recipe where time is equal."""
PAPERS_TREE: dict[str, Any] = {
    "tree": "fixed",
    "draft_depth": 6,
    "draft_nodes": 60,
    "draft_topk": 10,
}
"""EAGLE-2's, on which HASS and CORAL are compared too. A CPU's small trees rarely reach the depths that the unroll
trains: on pico's (10 nodes, cut at a confidence of 0.05), seed 0, HASS was 1.006 times EAGLE-2."""
TURNS = 12
"""Times that each kind of step is timed."""
CHECKED = 10
"""Prompts on which a replay is compared with real decoding, in the rows that are compared."""


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
        """As the table calls it: a comparison's rows by their method alone."""
        if is_comparison(self.part):
            return self.preset
        return " ".join([self.preset, *(f"{key}={value}" for key, value in self.changes)])


def identity(spec: TrainSpec) -> dict[str, Any]:
    """The spec's keys, without the one that was added since rows were first measured, at what it was then."""
    keys = dataclasses.asdict(spec)
    return keys if keys["unroll_drawn"] else {key: value for key, value in keys.items() if key != "unroll_drawn"}


def ablations(spec: TrainSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is varied around CORAL."""
    yield "candidates", {"candidates": 0 if spec.candidates else PRESETS["quick"]["candidates"]}
    yield from (("growth", {"unroll_growth": share}) for share in (0.5, 0.75))
    yield from (("top-K", {"topk_weight": weight}) for weight in (0.0, 1.0))
    yield "distillation alone", {"regression_weight": 0.0, "distill_weight": 1.0, "topk_weight": 0.0}
    yield from (("unroll", {"unroll_steps": steps}) for steps in (1, 2, 4, 5))
    yield from (("weight", {"csra_weight": weight}) for weight in (0.03, 0.3))
    yield "temperature", {"csra_temperature": 0.5}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share."""

    recipe: Recipe
    run: Path
    store: Store
    target: Target
    prompts: list[list[int]]
    repeating: list[Target]
    skipped: int = 0
    """Held-out prompts that come before these, and are left out."""
    noise: float | None = None
    """Of the features that the methods as published are trained on; None: the recipe's."""

    def spec(self, variant: Variant) -> TrainSpec:
        """The recipe's training with a preset's keys, then the variant's."""
        fixed = {"preset": variant.preset, "steps": variant.steps, "eval_every": 0}
        fixed["candidates"] = self.recipe.train.candidates
        method = {**AS_PUBLISHED, **PRESETS[variant.preset]}
        method |= {} if self.noise is None else {"feature_noise": self.noise}
        return dataclasses.replace(self.recipe.train, **{**method, **fixed, **dict(variant.changes)})

    def form(self, method: str) -> tuple[tuple[str, Any], ...]:
        """What a method takes from the recipe where time is equal: CORAL its whole form, HASS how its passes come."""
        keys = {"eagle2": (), "hass": PASSES, "coral": FORM}[method]
        return tuple((key, getattr(self.recipe.train, key)) for key in keys)

    def key(self, variant: Variant) -> str:
        """Everything that decides a row's numbers."""
        train_keys = identity(self.spec(variant))
        del train_keys["preset"]
        data, tree = self.store.manifest.fingerprint, dataclasses.asdict(self.recipe.decode)
        asked = [self.skipped, len(self.prompts)] if self.skipped else len(self.prompts)
        return fingerprint([data, self.target.fingerprint, tree, asked, variant.seed, train_keys])

    def measure(self, variant: Variant) -> Row:
        """Train, and count tokens and rounds on every prompt."""
        begun_s = time.perf_counter()
        spec = self.spec(variant)
        recipe, run = self.own_run(variant, spec)
        manifest, _ = train_drafter(recipe, run, progress_line(variant), tap=self.store.tap)
        last, drafter = manifest.facts["last"], load_drafter(run / "drafter")
        emitted = [
            self.decode(target, drafter, [prompt])[0]
            for target, prompt in zip(self.repeating, self.prompts, strict=True)
        ]
        row = {
            "part": variant.part,
            "name": variant.name,
            "seed": variant.seed,
            "steps": spec.steps,
            "train_s": last["elapsed_s"],
            "row_s": time.perf_counter() - begun_s,
            "run": run.name,
            "last": {key: value for key, value in last.items() if key.startswith(("loss", "accuracy", "cosine"))},
            "tokens": [sum(rounds) for rounds in emitted],
            "rounds": [len(rounds) for rounds in emitted],
            "accepted_by_depth": accepted_by_depth([tokens - 1 for rounds in emitted for tokens in rounds]),
        }
        if is_comparison(variant.part) and variant.seed == 0:
            decoded = self.decode(self.target, drafter, self.prompts[:CHECKED])
            row["decoded_alike"] = [sum(a == b for a, b in zip(decoded, emitted, strict=False)), len(decoded)]
        return row

    def own_run(self, variant: Variant, spec: TrainSpec) -> tuple[Recipe, Path]:
        """A run for one training, on the same data: its drafter stays there, for other benchmarks."""
        run = self.run / "methods" / self.key(variant)
        run.mkdir(parents=True, exist_ok=True)
        recipe = dataclasses.replace(self.recipe, name=run.name, seed=variant.seed, train=spec)
        write_text(run / "recipe.yaml", dump_yaml(recipe))
        if not (run / "data").exists():
            (run / "data").symlink_to((self.run / "data").resolve(), target_is_directory=True)
        return recipe, run

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


def open_bench(recipe: Recipe, run: Path, prompts: int, skipped: int = 0, noise: float | None = None) -> Bench:
    """Data, target, and the target's own answers to so many held-out prompts after those that are skipped.

    The answers are kept for the next time.
    """
    target = load_target(recipe.target)
    store = open_data(recipe, run, lambda *batch: (tap(target, *batch).feature_BTD, None))
    if store.manifest.inputs["target"] != target.fingerprint:
        raise ArtifactError(f"{store.folder} was made with another target. Run: coral prepare-data")
    held = store.holdout_prompts
    wanted = skipped + prompts
    if len(held) < wanted:
        raise ArtifactError(
            f"{store.folder} holds {len(held)} held-out prompts of the {wanted} wanted. "
            f"Run coral prepare-data with data.holdout={wanted}, or lower --prompts"
        )
    chosen = held[skipped:wanted]
    folder = run / "methods"
    folder.mkdir(exist_ok=True)
    settings = [target.fingerprint, chosen, dataclasses.asdict(recipe.decode), recipe.seed]
    path = folder / f"answers-{fingerprint(settings)}.json"
    if not path.exists():
        print(f"{prompts} plain answers, once", file=sys.stderr, flush=True)
        made = list(replay.plain_answers(target, chosen, sampler(recipe), recipe.decode.max_new_tokens))
        write_text(path, json.dumps(made) + "\n")
    answers = zip(chosen, json.loads(path.read_text()), strict=True)
    repeating = [replay.repeating(target, prompt, answer, store.taps) for prompt, answer in answers]
    return Bench(recipe, run, store, target, chosen, repeating, skipped, noise)


class Rows:
    """The rows file: one JSON object per finished row, by key."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            self.done[row.pop("key")] = row

    def keep(self, key: str, row: Row) -> None:
        """A row that is finished."""
        self.done[key] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **row}) + "\n")

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


def _begin(threads: int, recipe: Recipe, run: Path, *asked: Any) -> None:
    torch.set_num_threads(threads)
    _workers_own.append(open_bench(recipe, run, *asked))


def _measure(variant: Variant) -> Row:
    return _workers_own[0].measure(variant)


def passes_of(name: str) -> int:
    """The number of passes in a cost's name, "METHOD PASSES"."""
    return int(name.split()[1])


def step_costs(bench: Bench) -> dict[str, float]:
    """Seconds of a step of each method with each number of passes, by "METHOD PASSES", measured once.

    All take the same batch in turns, and the least of TURNS counts. Where passes are drawn, at a step that draws them.
    """
    specs = {}
    for method in METHODS:
        form = dict(bench.form(method)) | {"unroll_growth": 0.0}
        for passes in range(1, bench.spec(Variant("cost", method, 0, 1, bench.form(method))).unroll_steps + 1):
            changes = tuple((form | {"unroll_steps": passes}).items())
            specs[f"{method} {passes}"] = bench.spec(Variant("cost", method, 0, 1, changes))
    what = [bench.store.manifest.fingerprint, torch.get_num_threads(), [identity(s) for s in specs.values()]]
    path = bench.run / "methods" / f"costs-{fingerprint(what)}.json"
    if not path.exists():
        accelerator = make_accelerator(bench.recipe.train, bench.run / "methods")
        trainers = {name: Trainer(spec, bench.store, 0, accelerator) for name, spec in specs.items()}
        micro = next(trainers[f"{METHODS[0]} 1"].micro_batches())
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(TURNS):
            for name, trainer in trainers.items():
                drawing = (step for step in itertools.count() if unroll_steps(trainer.spec, step, 0) == passes_of(name))
                trainer.step = next(drawing)
                times[name].append(_step_seconds(trainer, micro))
        write_text(path, json.dumps({name: min(seconds) for name, seconds in times.items()}, indent=1) + "\n")
    costs: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return costs


def _step_seconds(trainer: Trainer, micro: MicroBatch) -> float:
    begun_s = busy_s()
    loss, _ = trainer.loss(micro)
    trainer.accelerator.backward(loss / micro.rows)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP_NORM)
    trainer.update()
    return busy_s() - begun_s


def training_seconds(spec: TrainSpec, seed: int, costs: dict[str, float]) -> float:
    """What all steps of a training cost."""
    return sum(costs[f"{spec.preset} {unroll_steps(spec, step, seed)}"] for step in range(spec.steps))


def timed(
    bench: Bench, costs: dict[str, float], steps: int, seed: int, methods: Sequence[str] = METHODS
) -> list[Variant]:
    """The methods in the time that CORAL takes for `steps`."""
    part = f"equal time, {steps} steps of coral"

    def lasting(method: str) -> Variant:
        trial = Variant(part, method, seed, 1000, bench.form(method))
        share = training_seconds(bench.spec(coral), seed, costs) / training_seconds(bench.spec(trial), seed, costs)
        return dataclasses.replace(trial, steps=round(1000 * share))

    coral = Variant(part, "coral", seed, steps, bench.form("coral"))
    return [coral if method == "coral" else lasting(method) for method in methods]


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
        initializer=_begin,
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
