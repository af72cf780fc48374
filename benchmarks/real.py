"""The paper's table on a model that people use: methods by MT-bench, HumanEval and GSM8K, tau and speed, T = 0 and 1.

    python -m benchmarks.real smollm2 --target FOLDER --questions DIR --drafters eagle2=RUN hass=RUN coral=RUN
    python -m benchmarks.real smollm2 … --counted coral@1=RUN coral@2=RUN …      # other seeds, in tau alone
    python -m benchmarks.real smollm2 … --gguf FILE --llamacpp TOOLS             # llama.cpp on the same cores
    python -m benchmarks.real smollm2 … --limit 0                                # tau alone, on a busy machine too

First the rounds of each method are counted on --count questions a bench (benchmarks/real_rounds.py). Then the race:
each of --limit questions a bench is answered by all lanes in turns, in one process, another one first each time: plain
decoding (coral's loop, exact and not, and `generate`, float32 and bfloat16), each method with the full head, those with
a grouped head with that too, prompt lookup, and llama.cpp. After the first --heat questions of each bench at a
temperature, of the lanes that do the same in another dtype or loop only those go on that are at most a tenth slower
than the fastest; so the plain lane that a speed is compared with is the fastest of six. A row is appended to --rows
when it is done, and never computed twice. Then results/real.json, or what --results names, is written anew. What was
not measured now stays in it: other models, temperatures and methods.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode_race import generated
from benchmarks.llamacpp import LlamaCpp, rewritten
from benchmarks.real_figures import drafts_with, figures, is_ours, parts, speed
from benchmarks.real_rounds import Asked, Drafted, Row, rounds
from benchmarks.record import RESULTS, machine, record
from benchmarks.rows import append, read
from coral_core.artifacts import fingerprint
from coral_core.bench.baseline import generate_lane
from coral_core.bench.questions import from_file
from coral_core.bench.race import Lane, first_prompt, run_lane
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.sampling import Sampler
from coral_core.recipe.loader import load_recipe
from coral_core.target.load import load_target
from coral_core.target.target import Target

BENCHES = ("mt-bench", "humaneval", "gsm8k")
DTYPES = ("float32", "bfloat16")
SEED = 0
"""Of the questions that are drawn, and of sampling."""
LOOKUP_TOKENS = 10
NEARLY = 0.9
"""A lane with so much of the fastest one's speed on few questions may be the faster on more."""
NO_SIBLING = {"smollm2": "SmolLM2-135M is the smallest of its family: assisted generation has no model to draft with"}

Answer = Callable[[list[int], float], Lane]
"""Decodes a prompt at a temperature."""


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

        def inexact(prompt: list[int], temperature: float, target: Target = target) -> Lane:
            return run_lane(plain(dataclasses.replace(target, exact=False), prompt, sampler(temperature), tokens))

        def theirs(prompt: list[int], temperature: float, target: Target = target) -> Lane:
            return generate_lane(target, prompt, sampler(temperature), tokens)

        def lookup(prompt: list[int], temperature: float, target: Target = target) -> Lane:
            sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
            return generated(target, prompt, tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS, **sampled)

        yield f"plain {dtype}", own
        yield f"plain inexact {dtype}", inexact
        yield f"generate {dtype}", theirs
        yield f"lookup {dtype}", lookup
        for method in options.drafters:
            yield from drafted_lanes(method, target, dtype, tokens)


def drafted_lanes(method: Drafted, target: Target, dtype: str, tokens: int) -> Iterator[tuple[str, Answer]]:
    """A method with each of its heads, and the tree or the copy that pays."""
    for head in method.heads:
        engine = method.engine(target, head, "auto")

        def draft(prompt: list[int], temperature: float, engine: Engine = engine) -> Lane:
            return run_lane(engine.decode(prompt, sampler(temperature), tokens))

        yield f"{method.name} {head} auto {dtype}", draft


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


def asked(options: argparse.Namespace, target: Target, limit: int) -> list[Asked]:
    """So many questions a bench, drawn from the whole of it, that fit the context; the benches take turns."""
    found = []
    for bench in options.benches:
        whole = from_file(options.questions / f"{bench}.jsonl")
        drawn = random.Random(SEED).sample(whole, min(limit, len(whole)))
        prompts = [(question.name, first_prompt(target, question)) for question in drawn]
        fitting = [(name, prompt) for name, prompt in prompts if len(prompt) < target.max_positions]
        found += [(place, bench, name, prompt) for place, (name, prompt) in enumerate(fitting)]
    found.sort(key=lambda one: one[0])
    return [
        Asked(bench, name, temperature, prompt)
        for temperature in options.temperatures
        for _, bench, name, prompt in found
    ]


def ahead(rows: Sequence[Row]) -> set[str]:
    """The lanes that go on after these rows: of those that do the same, the fastest and what is nearly as fast; all
    that have no other; and plain decoding in every dtype that a drafted answer is compared in."""
    same: dict[str, list[str]] = {}
    for name in rows[0]["lanes"]:
        words = name.split()
        kind = {"plain": "plain", "generate": "plain", "lookup": "lookup"}.get(words[0], name)
        same.setdefault(" ".join(words[:3]) if is_ours(name) else kind, []).append(name)
    best = {kind: max(speed(rows, name) for name in names) for kind, names in same.items()}
    kept = {name for kind, names in same.items() for name in names if speed(rows, name) >= NEARLY * best[kind]}
    return kept | {f"plain {name.split()[-1]}" for name in kept if is_ours(name)}


def race(options: argparse.Namespace, target: Target) -> list[Row]:
    """Rows of all questions and temperatures; those in --rows are taken from there."""
    wanted = asked(options, target, options.limit)
    racers = dict(lanes(options)) | dict(llama_lanes(options, target.tokenizer)) if wanted else {}
    made = [name for one in options.drafters for name in one.made(one.heads[-1])]
    where = [machine()[key] for key in ("device", "threads")]
    settings = fingerprint([target.fingerprint, made, sorted(racers), options.tokens, where])
    rows = [row for row in parts(list(read(options.rows)))[1] if row["settings"] == settings]
    done = [(row["bench"], row["question"], row["temperature"]) for row in rows]
    todo = [one for one in wanted if (one.bench, one.question, one.temperature) not in done]
    for number, one in enumerate(todo):
        whole = [row for row in rows if row["temperature"] == one.temperature and row["lanes"].keys() >= set(racers)]
        kept = ahead(whole) if len(whole) >= options.heat * len(options.benches) else set(racers)
        running = {name: answer for name, answer in racers.items() if name in kept}
        if number == 0:
            for answer in running.values():
                answer(one.prompt, one.temperature)
        row = one.row | {"settings": settings, "prompt_tokens": len(one.prompt)}
        rows.append(row | {"lanes": turn(running, one.prompt, one.temperature, number)})
        append(options.rows, rows[-1])
        print(f"{number + 1} of {len(todo)}: {one.bench} {one.question}, T={one.temperature:g}", file=sys.stderr)
    return [row | {"drafters": {one.name: one.made(one.heads[-1]) for one in options.drafters}} for row in rows]


def turn(racers: dict[str, Answer], prompt: list[int], temperature: float, number: int) -> dict[str, Row]:
    """Every lane once, another one first each time.

    Of `tokens` all but one came after the prefill, on the clock of `decode_s`. Rows of up to 2026-11-30 count more for
    two lanes: llama.cpp's one token of 96, which is 1 % of its speed, and prompt lookup's what its first round drafted,
    half a token or 0.5 %.
    """
    names = list(racers)
    first = number % len(names)
    found = {name: racers[name](prompt, temperature) for name in names[first:] + names[:first]}
    rows = {}
    for name in names:
        lane = found[name]
        rows[name] = {
            "tokens": (sum(lane.emitted) or len(lane.ids) - 1) + 1,  # `generate` tells no rounds
            "rounds": len(lane.emitted),
            "plain_rounds": lane.plain_rounds,
            "copied_rounds": lane.copied_rounds,
            "prefill_s": round(lane.prefill_s, 4),
            "decode_s": round(lane.decode_s, 4),
        }
        if is_ours(name):
            rows[name]["equal"] = lane.ids == found[f"plain {name.split()[-1]}"].ids
    return rows


def measure(options: argparse.Namespace) -> list[Row]:
    """Rounds that are counted, and the race."""
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    target = load_target(dataclasses.replace(options.spec, dtype=options.dtypes[0]))
    drafters = [*options.drafters, *options.counted]
    counted = rounds(target, drafters, asked(options, target, options.count), options.tokens, SEED, options.rows)
    return [{"model": options.model} | row for row in counted + race(options, target)]


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    """The results' file: what was measured now, and beside it what was not measured again, with all figures anew."""
    path = RESULTS / f"{options.results}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}, "rows": []}
    fresh = {measured(row) for row in rows}
    kept = [row for row in old["rows"] if measured(row) not in fresh] + rows
    own = [row for row in kept if row["model"] == options.model]
    found = {**old["figures"], options.model: figures(own)}
    if options.limit and (llama := found[options.model].get("llamacpp")):
        found["llamacpp"] = llama  # of the model that was raced last; each model's own stand with the model
    if options.model in NO_SIBLING:
        found[options.model]["assisted_generation"] = NO_SIBLING[options.model]
    print(json.dumps(found[options.model], indent=1))
    warmth = " and ".join(f"{temperature:g}" for temperature in options.temperatures)
    counted = dict.fromkeys(row["method"] for row in rows if "rounds" in row)
    raced = dict.fromkeys(drafts_with(name) for row in rows for name in row.get("lanes", ()) if is_ours(name))
    what = " and ".join(f"{kind} of {', '.join(some)}" for kind, some in (("race", raced), ("rounds", counted)) if some)
    print(f"written to {record(options.results, found, kept, f'{options.model}, {what}, T = {warmth}')}")


def measured(row: Row) -> tuple[Any, ...]:
    """What is measured anew as a whole: a race of some drafters, or a method's rounds with a head, at a temperature."""
    race = row["settings"] if "lanes" in row else None
    return row["model"], row["temperature"], row.get("method"), row.get("head"), race


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model's name in the results: smollm2, qwen")
    parser.add_argument("--target", required=True, help="a folder, a GGUF file or a Hub id")
    parser.add_argument("--questions", type=Path, required=True, help="a folder with BENCH.jsonl")
    parser.add_argument("--drafters", nargs="+", type=drafted, default=[], metavar="NAME=RUN")
    parser.add_argument("--counted", nargs="+", type=drafted, default=[], metavar="NAME=RUN", help="in tau alone")
    parser.add_argument("--benches", nargs="+", default=list(BENCHES))
    parser.add_argument("--count", type=int, default=40, help="questions a bench to count rounds on")
    parser.add_argument("--limit", type=int, default=40, help="questions a bench to race on")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heat", type=int, default=2, help="questions a bench and temperature that every lane answers")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp")
    parser.add_argument("--llamacpp", type=Path, help="the folder that xllamacpp was installed into")
    parser.add_argument("--results", default="real", help="the file of results: one for each machine")
    parser.add_argument("--rows", type=Path, help="where rows are kept; runs/real-MODEL.jsonl")
    options = parser.parse_args(arguments)
    options.rows = options.rows or Path("runs") / f"real-{options.model}.jsonl"
    options.spec = load_recipe(None, [f"name={options.model}", f"target.model={options.target}"]).target
    return options


if __name__ == "__main__":
    chosen = parse()
    write(chosen, measure(chosen))
