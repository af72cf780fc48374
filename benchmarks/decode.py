"""The decoding engine: a race of every way to decode, what a verification costs, forced acceptance, a round on a GPU.

    python -m benchmarks.decode                       # pico with its own drafter; some five minutes on two cores
    python -m benchmarks.decode --drafter eagle2=runs/eagle2 --drafter hass=runs/hass --drafter coral=runs/coral
    python -m benchmarks.decode --part gpu            # where there is CUDA: Llama-3-8B's shape, random weights

race: on the same prompts in turns, in float32 and bfloat16: `model.generate` (of the model with coral's products and
attention, and of an untouched one), our plain loop, transformers' prompt lookup and assisted generation, ours with each
--drafter NAME=RUN (a run's folder, with drafter/ and perhaps head/) with the full and with the grouped head; none of
these is compiled. --compiled adds a plain lane that is (a static cache and inductor, minutes to compile); its figure
stands beside the others', since not all of its answers equal plain ones. cost: the
target over N tree nodes, and a draft level, in plain steps and over this machine's own floor. oracle: acceptance
forced, the engine's own overhead apart from a drafter's quality. Those three replace their own rows of
results/decode.json; gpu writes results/decode-gpu.json, and skips aloud without CUDA, where `--part gpu --shape tiny`
runs its code on the CPU and records nothing.

[RECIPE.YAML] [section.key=value ...] choose target and tree, as in every command; the oracle's tree is fixed.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import decode_compiled, decode_cost, decode_gpu, decode_oracle, decode_race
from benchmarks.decode_steps import Parts
from benchmarks.record import RESULTS, record
from coral_cli.options import read_recipe
from coral_core.bench.contenders import contenders
from coral_core.bench.methods import Method, load_method
from coral_core.bench.questions import held_out
from coral_core.bench.race import first_prompt
from coral_core.errors import ArtifactError, CoralError, TargetError
from coral_core.recipe.schema import Recipe
from coral_core.target.load import load_target
from coral_core.target.target import Target

HEADS = ("full", "grouped")
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """The target in one dtype, its drafters with their heads, and the prompts."""

    target: Target
    methods: dict[str, Method]
    """By "drafter head"."""
    prompts: list[list[int]]


def forms(recipe: Recipe, options: argparse.Namespace) -> Iterator[Form]:
    """One per --dtype."""
    named = [text.partition("=")[::2] for text in options.drafter] if options.drafter else [(recipe.name, "")]
    for dtype in (name for name in DTYPES if name in (options.dtype or DTYPES)):
        own = dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, dtype=dtype))
        target = load_target(own.target)
        methods: dict[str, Method] = {}
        for name, folder in named:
            methods |= dict(_methods(own, options.runs / recipe.name, name, folder, target))
        questions = held_out(options.runs / recipe.name, recipe.target.model)
        prompts = [first_prompt(target, question) for question in questions][: options.prompts]
        yield Form(target, methods, prompts)


def _methods(recipe: Recipe, run: Path, name: str, folder: str, target: Target) -> Iterator[tuple[str, Method]]:
    """A drafter with each head; one without a grouped head of its own goes with the full one alone."""
    for contender in contenders(recipe, run, [folder] if folder else [], HEADS):
        kind = contender.recipe.head.kind
        try:
            yield f"{name} {kind}", load_method(contender, target)
        except ArtifactError as error:
            if kind == "full":
                raise
            print(f"{name}: no {kind} head: {error}", file=sys.stderr)


def race(found: list[Form], options: argparse.Namespace) -> Iterator[Row]:
    racers = []
    for form in found:
        racers += list(decode_race.entries(form.target, form.methods, options.tokens, options.assistant_layers))
        if options.compiled and (missing := decode_compiled.compiler_missing()):
            print(f"compiled: skipped, inductor has no compiler here: {missing}", file=sys.stderr)
        elif options.compiled:
            racers.append(decode_race.compiled_entry(form.target, options.tokens, max(map(len, form.prompts))))

    def told(done: int) -> None:
        print(f"race: {done} of {len(found[0].prompts)} prompts", file=sys.stderr, flush=True)

    yield from decode_race.race(racers, found[0].prompts, told)


def cost(found: list[Form], options: argparse.Namespace) -> Iterator[Row]:
    for form in found:
        first = next(iter(form.methods.values())).engine
        methods = reversed(form.methods.values())
        heads = {method.facts["head"]["kind"]: method.engine.head for method in methods if method.engine.head}
        assert first.drafter is not None
        parts = Parts(form.target, first.drafter, heads, first.shape, decode_cost.CONTEXT)
        yield from decode_cost.measure(parts, options.repeats)


def oracle(found: list[Form], options: argparse.Namespace) -> Iterator[Row]:
    for form in found:
        engine = next(iter(form.methods.values())).engine
        assert engine.drafter is not None
        some = form.prompts[: max(1, len(form.prompts) // 4)]
        yield from decode_oracle.measure(form.target, engine.drafter, decode_oracle.TREE, some, options.tokens)


def gpu(options: argparse.Namespace) -> None:
    """Print and, on a GPU, record."""
    if not torch.cuda.is_available() and options.shape != "tiny":
        print("gpu: skipped, this machine has no CUDA device; --shape tiny runs the code on the CPU", file=sys.stderr)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    for graphs in (False, True) if device.type == "cuda" else (False,):
        try:
            for row in decode_gpu.measure(options.shape, device, torch.bfloat16, options.repeats, graphs):
                rows.append(row)
                print(json.dumps(row), flush=True)
        except TargetError as error:
            if not graphs:
                raise
            rows = [row for row in rows if not row["graphs"]]  # worth keeping
            print(f"gpu: not measured with graphs: {error}", file=sys.stderr)
    found = decode_gpu.figures(rows)
    print(json.dumps(found, indent=1))
    if device.type == "cuda" and options.shape != "tiny":
        print(record("decode-gpu", found, rows))


def figures(rows: list[Row]) -> dict[str, Any]:
    """What the README quotes; a part that has not been run leaves its figures out."""
    found: dict[str, Any] = {}
    raced = [row for row in rows if row["part"] == "race"]
    best = {kind: _best(raced, kind) for kind in ("plain", "compiled", "transformers", "coral")}
    if best["plain"] and best["coral"]:
        found |= {
            "speedup_over_best_plain": best["coral"]["over_best_plain"],
            "speedup_over_best_plain_ci95": best["coral"]["over_best_plain_ci95"],
            "best": {kind: row["lane"] for kind, row in best.items() if row},
            "plain_over_generate": _over(raced, "plain", "generate"),
            "plain_over_untouched_generate": _over(raced, "plain", "generate, untouched model"),
            "other_share": best["coral"]["other_share"],
            "float32_answers_equal": all(row["equal"] == row["answers"] for row in raced if row["dtype"] == "float32"),
        }
        if best["compiled"]:
            found["compiled_over_plain"] = _over(raced, "compiled", "plain")
            found["speedup_over_compiled"] = best["coral"]["tokens_per_s"] / best["compiled"]["tokens_per_s"]
            found["compiled_answers"] = {key: best["compiled"][key] for key in ("answers", "equal")}
        if best["transformers"]:
            found["speedup_over_transformers_own"] = (
                best["coral"]["tokens_per_s"] / best["transformers"]["tokens_per_s"]
            )
    for row in rows:
        if row["part"] == "cost" and row["what"] == "verify" and row["rows"] in (1, 16):
            found.setdefault(f"verify{row['rows']}_over_floor", {})[row["dtype"]] = row["over_floor"]
        if row["part"] == "oracle" and row["right"] == 1.0:
            found.setdefault("oracle_round_over_plain_step", {})[row["dtype"]] = row["round_over_plain_step"]
    return found


def _best(raced: list[Row], kind: str) -> Row | None:
    return max((row for row in raced if row["kind"] == kind), key=lambda row: row["tokens_per_s"], default=None)


def _over(raced: list[Row], first: str, second: str) -> float:
    """The faster dtype of one method over the faster of another."""
    speeds = [max(row["tokens_per_s"] for row in raced if row["method"] == name) for name in (first, second)]
    return float(speeds[0] / speeds[1])


PARTS: dict[str, Callable[[list[Form], argparse.Namespace], Iterator[Row]]] = {
    "race": race,
    "cost": cost,
    "oracle": oracle,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.YAML SECTION.KEY=VALUE")
    parser.add_argument("--part", action="append", choices=[*PARTS, "gpu"], help="all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--drafter", action="append", metavar="NAME=RUN", help="the recipe's own run by default")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="both by default")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts; a quarter of them for the oracle")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--assistant-layers", type=int, default=4, help="of the target, as a draft model; 0: none")
    parser.add_argument(
        "--compiled", action="store_true", help="race a compiled plain lane too; compiling takes minutes"
    )
    parser.add_argument("--repeats", type=int, default=21, help="of each timed call in cost and gpu")
    parser.add_argument("--shape", choices=list(decode_gpu.SHAPES), default="llama-3-8b", help="of gpu's target")
    options = parser.parse_args()
    chosen = options.part or [*PARTS, "gpu"]
    path = RESULTS / "decode.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    try:
        if "gpu" in chosen:
            gpu(options)
        found = list(forms(read_recipe(options.arguments), options)) if set(chosen) & set(PARTS) else []
        for part in (name for name in PARTS if name in chosen):
            fresh = list(PARTS[part](found, options))
            rows = [row for row in rows if row["part"] != part] + fresh
            for row in fresh:
                print(json.dumps(row), flush=True)
            print(record("decode", figures(rows), rows, part))
    except CoralError as error:
        sys.exit(f"error: {error}")
    if found:
        print(json.dumps(figures(rows), indent=1))


if __name__ == "__main__":
    main()
