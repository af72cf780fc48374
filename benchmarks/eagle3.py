"""What EAGLE-3's shape is worth, step by step: each row changes one thing of the row before it.

    coral prepare-data recipes/smollm2-135m.yaml data.prompts=runs/real-prompts.jsonl train.preset=eagle3
    python -m benchmarks.eagle3 recipes/smollm2-135m.yaml data.prompts=runs/real-prompts.jsonl train.candidates=6144

The rows have equal data, initial seed and number of optimizer steps; tokens per round are counted as in
benchmarks/methods.py, of which this uses the rows file: a row is never computed twice, and an interrupted benchmark
goes on where it was. What a step of each row costs is timed once, in turns on the same batch. The figure
`eagle3_over_eagle2_shape` compares the best of the EAGLE-3 rows with CORAL as it is today, `equal_time` both in the
time of the former; `longer` says the same of --longer steps. Row h is the best row's drafter with a routed head of 1/8
of the rows, trained on the same data.

With --llamacpp TOOLS (pip install --target TOOLS xllamacpp gguf) and --gguf FILE, the target's own file, llama.cpp
drafts with the best row's drafter: chains of 4 on the first held-out prompts. In float32 its accepted tokens by depth
are compared with coral's own chain, round by round; tokens/s are measured with and without the drafter, in turns.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.llamacpp import Answer, LlamaCpp, rewritten
from benchmarks.methods import Rows, begin
from benchmarks.methods_bench import PAPERS_TREE, Bench, Variant, identity, open_bench
from benchmarks.methods_table import Row, counts
from benchmarks.methods_time import one_step_s
from benchmarks.paired import ratio, ratio_ci95, tau, tau_ci95
from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.artifacts import fingerprint, write_text
from coral_core.bench.acceptance import emitted_by_prompt
from coral_core.bench.metrics import accepted_by_depth
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.drafter.load import load_drafter
from coral_core.export.gguf_file import refuse as refuse_gguf
from coral_core.export.gguf_file import write_gguf
from coral_core.grouping.stage import group_head
from coral_core.head.heads import FullHead
from coral_core.recipe.schema import HeadSpec
from coral_core.run import Run, sampler, tree_shape
from coral_core.target.load import load_target
from coral_core.training.loop import make_accelerator
from coral_core.training.trainer import Trainer

TURNS = 5
GROUPED = HeadSpec(groups=256, active=32)
"""Row h's head: 1/8 of the rows."""
SERVED_DEPTH, SERVED_TOKENS, SERVED_PROMPTS = 4, 64, 8
WORDS: dict[str, Any] = {"regression_weight": 0.0, "distill_weight": 1.0, "topk_weight": 0.0, "csra_weight": 0.0}
THROUGH: dict[str, Any] = {**WORDS, "through_steps": True, "step_decay": 0.8, "feature_noise": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "a coral today": {},
    "b words alone": {**WORDS, "csra_weight": 0.1},
    "c gradients through the steps": {**THROUGH, "csra_weight": 0.1},
    "d three layers, EAGLE-3's body": {**THROUGH, "shape": "eagle3"},
    "e d with alignment": {**THROUGH, "shape": "eagle3", "csra_weight": 0.1},
    "g e with EAGLE-3.1's norms": {**THROUGH, "shape": "eagle3.1", "csra_weight": 0.1},
    "i coral's losses on e": {"shape": "eagle3", "through_steps": True},
    "j coral today, gradients through the steps": {"through_steps": True},
    "k coral's losses on g": {"shape": "eagle3.1", "through_steps": True},
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
    what = [bench.store.manifest.fingerprint, [identity(spec) for spec in specs.values()]]
    path = bench.run / "methods" / f"eagle3-costs-{fingerprint(what)}.json"
    if not path.exists():
        accelerator = make_accelerator(bench.recipe.train, bench.run / "methods")
        trainers = {name: Trainer(spec, bench.store, 0, accelerator) for name, spec in specs.items()}
        micro = next(trainers[TODAY].micro_batches())
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(TURNS):
            for name, trainer in trainers.items():
                times[name].append(one_step_s(trainer, micro))
        write_text(path, json.dumps({name: min(seconds) for name, seconds in times.items()}, indent=1) + "\n")
    costs: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return costs


def run_rows(bench: Bench, rows: Rows, wanted: argparse.Namespace, pool: ProcessPoolExecutor) -> Iterator[list[Row]]:
    """All rows done so far, after each one: seed by seed, CORAL in the time of the best row, both for longer."""
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
    found.append(grouped_row(bench, rows, variant(best, 0, wanted.steps)) | {"name": best})
    yield found
    longer = [(TODAY, wanted.longer, "longer"), (best, wanted.longer, "longer")]
    longer.append((TODAY, round(wanted.longer * costs[best] / costs[TODAY]), "longer, equal time"))
    variants = [dataclasses.replace(variant(name, 0, steps), part=part) for name, steps, part in longer if steps]
    for row, (name, *_) in zip(rows.measured(bench, variants, pool), longer, strict=False):
        found.append(row | {"name": name})
        yield found


def grouped_row(bench: Bench, rows: Rows, variant: Variant) -> Row:
    """Row h: the variant's drafter with the grouped head, which is trained in the variant's own run."""
    recipe, run = bench.own_run(variant, bench.spec(variant))
    recipe = dataclasses.replace(recipe, head=GROUPED)
    key = fingerprint([bench.key(variant), dataclasses.asdict(GROUPED)])
    if key not in rows.done:
        group_head(recipe, run, tap=bench.store.tap)
        made, emitted = Run(recipe, run), list[list[int]]()
        drafter, head = made.drafter(bench.target), made.head(bench.target)
        for target, prompt in zip(bench.repeating, bench.prompts, strict=True):
            engine = Engine(target, drafter, head, tree_shape(recipe.decode))
            emitted += emitted_by_prompt(engine, [prompt], sampler(recipe), recipe.decode.max_new_tokens)
        row = {"part": "grouped", "seed": variant.seed, "steps": variant.steps, "run": run.name}
        row |= {"tokens": [sum(rounds) for rounds in emitted], "rounds": [len(rounds) for rounds in emitted]}
        row["accepted_by_depth"] = accepted_by_depth([tokens - 1 for rounds in emitted for tokens in rounds])
        rows.keep(key, row)
    return rows.done[key]


@dataclasses.dataclass(frozen=True)
class Served:
    """llama.cpp, and the target's file in two forms."""

    tools: Path
    gguf: Path


def served(bench: Bench, variant: Variant, given: Served) -> dict[str, Any]:
    """llama.cpp with the variant's drafter: accepted by depth beside coral's own chain's, and tokens/s."""
    _, run = bench.own_run(variant, bench.spec(variant))
    drafter, file = load_drafter(run / "drafter"), run / "drafter.gguf"
    refuse_gguf(drafter)
    write_gguf(drafter, file)
    whole = rewritten(given.gguf, run / "target-float32.gguf", "F32")
    prompts = bench.prompts[:SERVED_PROMPTS]
    answers = {
        name: in_turns(given.tools, model, file, prompts) for name, model in (("F32", whole), ("own", given.gguf))
    }
    spec = dataclasses.replace(bench.recipe.target, model=str(given.gguf), dtype="float32")
    target = dataclasses.replace(load_target(spec), stop_ids=frozenset())
    shape = TreeShape(depth=SERVED_DEPTH, nodes=SERVED_DEPTH, topk=1)
    engine = Engine(target, drafter, FullHead(target.lent), shape)
    ours = [
        [event.accepted_drafts for event in list(engine.decode(prompt, Sampler(), SERVED_TOKENS))[1:]]
        for prompt in prompts
    ]
    theirs = [drafted.accepted for _, drafted in answers["F32"]]
    shared = [(a[: min(len(a), len(b))], b[: min(len(a), len(b))]) for a, b in zip(theirs, ours, strict=True)]
    return {
        "llamacpp_accepted_by_depth": by_depth([a for a, _ in shared]),
        "coral_accepted_by_depth": by_depth([b for _, b in shared]),
        "llamacpp_accepted_by_depth_equal": all(a == b for a, b in shared),
        "llamacpp_words_equal": all(
            alone.text == drafted.text for pairs in answers.values() for alone, drafted in pairs
        ),
        "llamacpp_speedup": {name: speedup(pairs) for name, pairs in answers.items()},
    }


def in_turns(tools: Path, model: Path, drafter: Path, prompts: list[list[int]]) -> list[tuple[Answer, Answer]]:
    """Each prompt's answer without the drafter and with it, one after the other."""
    alone = LlamaCpp(tools, model, 1024)
    drafted = LlamaCpp(tools, model, 1024, drafter=(drafter, SERVED_DEPTH))
    return [tuple(server.answer(prompt, SERVED_TOKENS) for server in (alone, drafted)) for prompt in prompts]  # type: ignore[misc]


def by_depth(accepted: list[list[int]]) -> list[int]:
    """Rounds that accepted the draft of each depth."""
    return [sum(n > depth for rounds in accepted for n in rounds) for depth in range(SERVED_DEPTH)]


def speedup(pairs: list[tuple[Answer, Answer]]) -> float:
    """Median over prompts of the ratio of tokens/s."""
    return statistics.median(drafted.tokens_per_s / alone.tokens_per_s for alone, drafted in pairs)


def best_row(found: list[Row], names: list[str] = WIDE) -> str:
    """Of the EAGLE-3 rows the one with the most tokens per round, of the seeds that are done."""
    done = [name for name in names if seeds(found, name)]
    return max(done, key=lambda name: tau(counts(found, "shape", name, seeds(found, name))))


def seeds(found: list[Row], name: str, part: str = "shape") -> list[int]:
    return sorted(row["seed"] for row in found if (row["part"], row["name"]) == (part, name))


def compared(
    found: list[Row], first: str, second: str, parts: tuple[str, str] = ("shape", "shape")
) -> tuple[float, list[float]] | None:
    """tau of `first` over that of `second`, each of its part of the rows, and its interval."""
    shared = sorted({*seeds(found, first, parts[0])} & {*seeds(found, second, parts[1])})
    if not shared:
        return None
    pair = counts(found, parts[0], first, shared), counts(found, parts[1], second, shared)
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
        "eagle3_over_eagle2_shape_equal_time": compared(found, best, TODAY, ("shape", "equal time")),
        "eagle3_over_eagle2_shape_longer": compared(found, best, TODAY, ("longer", "longer")),
        "eagle3_over_eagle2_shape_longer_equal_time": compared(found, best, TODAY, ("longer", "longer, equal time")),
        "grouped_tau_kept": compared(found, best, best, ("grouped", "shape")),
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
    parser.add_argument("--longer", type=int, default=2400, help="steps of the best row and CORAL again; 0 for none")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--record", default="eagle3", metavar="NAME", help="the figures go to results/NAME.json")
    parser.add_argument("--llamacpp", type=Path, help="the folder that xllamacpp was installed into")
    parser.add_argument("--gguf", type=Path, help="the target's own file, for --llamacpp")
    wanted = parser.parse_args()
    recipe = read_recipe(wanted.arguments)
    tree = dataclasses.replace(recipe.decode, **PAPERS_TREE, temperature=0.0, max_new_tokens=48)
    recipe = dataclasses.replace(recipe, decode=tree)
    run = wanted.runs / recipe.name
    bench = open_bench(recipe, run, wanted.prompts)
    begun_s = time.perf_counter()
    with ProcessPoolExecutor(1, initializer=begin, initargs=(1, recipe, run, wanted.prompts)) as pool:
        for found in run_rows(bench, Rows(run / "methods.jsonl"), wanted, pool):
            record(wanted.record, figures(bench, found), shown(found))
            spent_min = (time.perf_counter() - begun_s) / 60
            print(f"{found[-1]['name']}: {len(found)} rows, {spent_min:.0f} min", file=sys.stderr, flush=True)
    if wanted.llamacpp and wanted.gguf:
        served_best = best_row(found, [name for name in WIDE if ROWS[name]["shape"] == "eagle3"])
        told = served(bench, variant(served_best, 0, wanted.steps), Served(wanted.llamacpp, wanted.gguf))
        record(wanted.record, figures(bench, found) | told, shown(found))


if __name__ == "__main__":
    main()
