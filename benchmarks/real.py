"""The paper's table on a model that people use: methods by MT-bench, HumanEval and GSM8K, tau and speed, T = 0 and 1.

    python -m benchmarks.real smollm2 --target FOLDER --questions DIR --drafters eagle2=RUN hass=RUN coral=RUN
    python -m benchmarks.real smollm2 … --drafters coral=RUN coral@1=RUN …       # several seeds of a method
    python -m benchmarks.real smollm2 … --gguf FILE --llamacpp TOOLS             # llama.cpp on the same cores

Every question is answered by all lanes in turns, in one process, another one first each time: plain decoding (coral's
loop and `generate`, float32 and bfloat16), each method with the full head, those with a grouped head with that too,
prompt lookup, and llama.cpp. After the first --heat questions of each bench, of the lanes that do the same in another
dtype or loop only the fastest goes on; so the plain lane that a speed is compared with is the fastest of four. A row is
appended to --rows when its question is done, and never computed twice. Then results/real.json is written anew; figures
of other models in it stay.
Axes: N row: a seed, P prompt.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.decode_race import generated
from benchmarks.llamacpp import LlamaCpp, rewritten
from benchmarks.paired import Counts, ratio, ratio_ci95, tau
from benchmarks.record import RESULTS, record
from coral_core.artifacts import Manifest, fingerprint
from coral_core.bench.baseline import generate_lane
from coral_core.bench.questions import Question, from_file
from coral_core.bench.race import Lane, first_prompt, run_lane
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.sampling import Sampler
from coral_core.recipe.loader import load_recipe
from coral_core.run import Run
from coral_core.target.load import load_target
from coral_core.target.target import Target

BENCHES = ("mt-bench", "humaneval", "gsm8k")
DTYPES = ("float32", "bfloat16")
SEED = 0
"""Of the questions that are drawn, and of sampling."""
LOOKUP_TOKENS = 10
PAPERS_TREE = ("decode.draft_depth=6", "decode.draft_nodes=60", "decode.draft_topk=10")
"""EAGLE-2's, which HASS and CORAL are compared on: methods' tau is that of fixed trees, speeds are those of `auto`."""
NO_SIBLING = {"smollm2": "SmolLM2-135M is the smallest of its family: assisted generation has no model to draft with"}

Row = dict[str, Any]
Answer = Callable[[list[int], float], Lane]
"""Decodes a prompt at a temperature."""


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A method's run on disk: `name` is METHOD or METHOD@SEED."""

    name: str
    folder: Path

    @property
    def heads(self) -> tuple[str, ...]:
        return ("full", "grouped") if (self.folder / "head").exists() else ("full",)

    @property
    def fingerprints(self) -> list[str]:
        """Of the drafter, and of its grouped head if it has one."""
        parts = [("drafter", "coral train"), ("head", "coral group-head")][: len(self.heads)]
        return [Manifest.read(self.folder / kind, kind, command).fingerprint for kind, command in parts]

    def engine(self, target: Target, head: str, tree: str) -> Engine:
        """The run's own recipe on this target; the tree is the one that pays (auto), or always as large (fixed)."""
        keys = [f"decode.tree={tree}", f"head.kind={head}", *PAPERS_TREE]
        return Run(load_recipe(self.folder / "recipe.yaml", keys), self.folder).engine(target)


def drafted(text: str) -> Drafted:
    name, _, folder = text.partition("=")
    if not (Path(folder) / "drafter").is_dir():
        raise argparse.ArgumentTypeError(f"'{text}': {folder or 'no folder'} holds no drafter; give NAME=RUN")
    return Drafted(name, Path(folder))


def sampler(temperature: float) -> Sampler:
    return Sampler(temperature=temperature, seed=SEED)


def lanes(options: argparse.Namespace) -> Iterator[tuple[str, Answer]]:
    """Every lane by its name: what decodes, its head and tree, the dtype."""
    tokens = options.tokens
    for dtype in options.dtypes:
        target = load_target(dataclasses.replace(options.spec, dtype=dtype))

        def own(prompt: list[int], temperature: float, target: Target = target) -> Lane:
            return run_lane(plain(target, prompt, sampler(temperature), tokens))

        def theirs(prompt: list[int], temperature: float, target: Target = target) -> Lane:
            return generate_lane(target, prompt, sampler(temperature), tokens)

        def lookup(prompt: list[int], temperature: float, target: Target = target) -> Lane:
            sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
            return generated(target, prompt, tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS, **sampled)

        yield f"plain {dtype}", own
        yield f"generate {dtype}", theirs
        yield f"lookup {dtype}", lookup
        for method in options.drafters:
            trees = ("fixed", "auto") if dtype == options.dtypes[0] else ("auto",)
            yield from drafted_lanes(method, target, dtype, trees, tokens)


def drafted_lanes(
    method: Drafted, target: Target, dtype: str, trees: Sequence[str], tokens: int
) -> Iterator[tuple[str, Answer]]:
    """A method with each of its heads and each kind of tree."""
    for head, tree in itertools.product(method.heads, trees):
        engine = method.engine(target, head, tree)

        def draft(prompt: list[int], temperature: float, engine: Engine = engine) -> Lane:
            return run_lane(engine.decode(prompt, sampler(temperature), tokens))

        yield f"{method.name} {head} {tree} {dtype}", draft


def llama_lanes(options: argparse.Namespace, tokenizer: Any) -> Iterator[tuple[str, Answer]]:
    """llama.cpp in the file's own bits, and in bfloat16; in the former with its n-grams too."""
    if not (options.llamacpp and options.gguf):
        print("llama.cpp is left out: it wants --llamacpp and --gguf", file=sys.stderr)
        return
    whole = rewritten(options.gguf, options.rows.with_name(f"{options.model}-bfloat16.gguf"), "BF16")
    for name, file, ngram in (("q4", options.gguf, False), ("q4 ngram", options.gguf, True), ("bf16", whole, False)):
        server = LlamaCpp(options.llamacpp, file, 4096, ngram)

        def answer(prompt: list[int], temperature: float, server: LlamaCpp = server) -> Lane:
            return server.decode(tokenizer.decode(prompt), options.tokens, temperature)

        yield f"llamacpp {name}", answer


def asked(options: argparse.Namespace, target: Target) -> list[tuple[str, Question]]:
    """So many questions a bench, drawn from the whole of it, that fit the context; the benches take turns."""
    found = []
    for bench in options.benches:
        whole = from_file(options.questions / f"{bench}.jsonl")
        drawn = random.Random(SEED).sample(whole, min(options.limit, len(whole)))
        fitting = [question for question in drawn if len(first_prompt(target, question)) < target.max_positions]
        found += [(place, bench, question) for place, question in enumerate(fitting)]
    return [(bench, question) for _, bench, question in sorted(found, key=lambda one: one[0])]


def ahead(rows: Sequence[Row]) -> set[str]:
    """The lanes that go on after these rows: the fastest of those that do the same, all that have no other, and plain
    decoding in every dtype that a drafted answer is compared in."""
    same: dict[str, list[str]] = {}
    for name in rows[0]["lanes"]:
        words = name.split()
        kind = {"plain": "plain", "generate": "plain", "lookup": "lookup"}.get(words[0], name)
        same.setdefault(" ".join(words[:3]) if " auto " in name else kind, []).append(name)
    kept = {max(names, key=functools.partial(speed, rows)) for names in same.values()}
    return kept | {f"plain {name.split()[-1]}" for name in kept if is_ours(name)}


def measure(options: argparse.Namespace) -> list[Row]:
    """Rows of all questions and temperatures; those in --rows are taken from there."""
    racers = dict(lanes(options))
    target = load_target(dataclasses.replace(options.spec, dtype=options.dtypes[0]))
    racers |= dict(llama_lanes(options, target.tokenizer))
    made = [name for one in options.drafters for name in one.fingerprints]
    settings = fingerprint([target.fingerprint, made, sorted(racers), options.tokens])
    rows = [row for row in read(options.rows) if row["settings"] == settings]
    done = {(row["bench"], row["question"], row["temperature"]) for row in rows}
    todo = [
        (bench, question, temperature)
        for temperature in options.temperatures
        for bench, question in asked(options, target)
        if (bench, question.name, temperature) not in done
    ]
    heat, everyone = options.heat * len(options.benches), set(racers)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    for number, (bench, question, temperature) in enumerate(todo):
        prompt = first_prompt(target, question)
        whole = [row for row in rows if row["lanes"].keys() >= everyone]
        if len(whole) >= heat:
            kept = ahead(whole)
            racers = {name: answer for name, answer in racers.items() if name in kept}
        if number == 0:
            for answer in racers.values():
                answer(prompt, temperature)
        row = {"model": options.model, "bench": bench, "question": question.name, "temperature": temperature}
        row |= {"settings": settings, "prompt_tokens": len(prompt), "lanes": turn(racers, prompt, temperature, number)}
        rows.append(row)
        with options.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number + 1} of {len(todo)}: {bench} {question.name}, T={temperature:g}", file=sys.stderr, flush=True)
    return rows


def read(path: Path) -> list[Row]:
    """The rows that are there; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}}}")]


def turn(racers: dict[str, Answer], prompt: list[int], temperature: float, number: int) -> dict[str, Row]:
    """Every lane once, another one first each time."""
    names = list(racers)
    first = number % len(names)
    found = {name: racers[name](prompt, temperature) for name in names[first:] + names[:first]}
    rows = {}
    for name in names:
        lane = found[name]
        rows[name] = {
            "tokens": len(lane.ids) or sum(lane.emitted) + 1,
            "rounds": len(lane.emitted),
            "plain_rounds": lane.plain_rounds,
            "copied_rounds": lane.copied_rounds,
            "prefill_s": round(lane.prefill_s, 4),
            "decode_s": round(lane.decode_s, 4),
        }
        if is_ours(name):
            rows[name]["equal"] = lane.ids == found[f"plain {name.split()[-1]}"].ids
    return rows


# ---- what the rows say


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What the README quotes: means over the benches, at temperature 0 unless said otherwise."""
    greedy = [row for row in rows if row["temperature"] == 0]
    everywhere = lanes_of(rows)
    names = [name for name in everywhere if is_ours(name)]
    methods = sorted({name.split()[0].partition("@")[0] for name in names})
    coral = [name for name in names if name.startswith("coral") and " auto " in name]
    plains = [name for name in everywhere if name.split()[0] in ("plain", "generate")]
    found: dict[str, Any] = {"questions": len(greedy), "tau": {}}
    for method in methods:
        found["tau"][method] = by_bench(greedy, functools.partial(tau_of, method=method))
    if coral:
        found["speedup_greedy"] = by_bench(greedy, lambda part: fastest(part, coral) / fastest(part, plains))
    if lookups := [name for name in everywhere if name.startswith("lookup")]:
        found["lookup_speedup_greedy"] = by_bench(greedy, lambda part: fastest(part, lookups) / fastest(part, plains))
    if {"coral", "hass"} <= set(methods):
        pair = counts(greedy, "coral", "full"), counts(greedy, "hass", "full")
        found |= {"coral_over_hass": ratio(*pair), "coral_over_hass_ci95": ratio_ci95(*pair)}
    if grouped := [name for name in coral if " grouped " in name]:
        found["grouped_tau_kept"] = ratio(counts(greedy, "coral", "grouped"), counts(greedy, "coral", "full"))
        full = [name for name in coral if " full " in name]
        found["grouped_gain"] = by_bench(greedy, lambda part: fastest(part, grouped) / fastest(part, full))
    equal = [lane["equal"] for row in rows for lane in row["lanes"].values() if "equal" in lane]
    return found | {"lossless_share": fmean(equal) if equal else None}


def lanes_of(rows: Sequence[Row]) -> list[str]:
    """The lanes that answered every question."""
    return [name for name in rows[0]["lanes"] if all(name in row["lanes"] for row in rows)]


def is_ours(name: str) -> bool:
    """Whether a lane drafts with a drafter of ours, and must say what plain decoding says."""
    return name.split()[1] in ("full", "grouped")


def fastest(rows: Sequence[Row], names: Sequence[str]) -> float:
    """The speed of the fastest of some lanes."""
    return max(speed(rows, name) for name in names)


def by_bench(rows: Sequence[Row], number: Callable[[Sequence[Row]], float]) -> float:
    """The mean of a number over the benches."""
    return fmean(
        number([row for row in rows if row["bench"] == name]) for name in dict.fromkeys(r["bench"] for r in rows)
    )


def counts(rows: Sequence[Row], method: str, head: str) -> Counts:
    """Tokens and rounds [N,P] of a method's seeds on each question, with trees of a fixed size."""
    wanted = [name for name in lanes_of(rows) if name.split()[1:3] == [head, "fixed"]]
    seeds = [name for name in wanted if name.split()[0].partition("@")[0] == method]
    tokens = np.array([[row["lanes"][name]["tokens"] - 1 for row in rows] for name in seeds])
    rounds = np.array([[row["lanes"][name]["rounds"] for row in rows] for name in seeds])
    return tokens, rounds


def tau_of(rows: Sequence[Row], method: str) -> float:
    """Tokens per round of a method with the full head, over its seeds."""
    return tau(counts(rows, method, "full"))


def speed(rows: Sequence[Row], name: str) -> float:
    """Tokens after the first, per second after the prefill."""
    found = [row["lanes"][name] for row in rows]
    return sum(lane["tokens"] - 1 for lane in found) / sum(lane["decode_s"] for lane in found)


def llama_figures(rows: Sequence[Row]) -> dict[str, float]:
    """llama.cpp's speed, and coral's plain loop over it in the same bits."""
    greedy = [row for row in rows if row["temperature"] == 0 and "llamacpp q4" in row["lanes"]]
    if not greedy:
        return {}
    found = {}
    for kind in ("q4", "q4 ngram", "bf16"):
        rate = functools.partial(speed, name=f"llamacpp {kind}")
        found[f"{kind.replace(' ', '_')}_tokens_per_s"] = by_bench(greedy, rate)
    if "plain bfloat16" in lanes_of(greedy):
        found["plain_over_llamacpp_same_bits"] = by_bench(
            greedy, lambda part: speed(part, "plain bfloat16") / speed(part, "llamacpp bf16")
        )
    return found


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """results/real.json: this model's rows and figures anew, other models' as they were."""
    path = RESULTS / "real.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}, "rows": []}
    found = {**old["figures"], options.model: figures(rows)}
    if llama := llama_figures(rows):
        found["llamacpp"] = llama  # of the model that was raced last
    if options.model in NO_SIBLING:
        found[options.model]["assisted_generation"] = NO_SIBLING[options.model]
    others = [row for row in old["rows"] if row["model"] != options.model]
    print(json.dumps(found[options.model], indent=1))
    part = f"{options.model}, T = {' and '.join(f'{temperature:g}' for temperature in options.temperatures)}"
    print(f"written to {record('real', found, others + rows, part)}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model's name in the results: smollm2, qwen")
    parser.add_argument("--target", required=True, help="a folder, a GGUF file or a Hub id")
    parser.add_argument("--questions", type=Path, required=True, help="a folder with BENCH.jsonl")
    parser.add_argument("--drafters", nargs="+", type=drafted, default=[], metavar="NAME=RUN")
    parser.add_argument("--benches", nargs="+", default=list(BENCHES))
    parser.add_argument("--limit", type=int, default=40, help="questions a bench")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heat", type=int, default=2, help="questions a bench that every lane answers")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp")
    parser.add_argument("--llamacpp", type=Path, help="the folder that xllamacpp was installed into")
    parser.add_argument("--rows", type=Path, help="where rows are kept; runs/real-MODEL.jsonl")
    options = parser.parse_args(arguments)
    options.rows = options.rows or Path("runs") / f"real-{options.model}.jsonl"
    options.spec = load_recipe(None, [f"name={options.model}", f"target.model={options.target}"]).target
    return options


if __name__ == "__main__":
    chosen = parse()
    write(chosen, measure(chosen))
