"""Throughput of several prompts at once: the engine one by one, batches, and `model.generate` on padded batches.

    python -m benchmarks.batch                    # pico on its held-out prompts, about five minutes on two cores
    python -m benchmarks.batch my.yaml --prompts 64 --seats 4 16 target.device=cuda

Interleaved: every lane decodes every repetition of the same prompts, and the order of the lanes turns. Answers are
greedy and compared with the engine's own, one by one.
Axes: B batch, T position.
"""

import argparse
import functools
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import record
from coral_core.bench.questions import held_out
from coral_core.bench.race import first_prompt
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Seat
from coral_core.decoding.step import room
from coral_core.decoding.table import Request, Table
from coral_core.recipe.loader import load_recipe
from coral_core.run import Run
from coral_core.target.load import load_target
from coral_core.target.target import Target

Answers = list[list[int]]
Decoded = tuple[Answers, list[int]]
"""The answers, and the tokens that each draft round emitted."""
NEW = 96


def decode_all(engine: Engine, requests: Sequence[Request], places: int) -> Iterator[tuple[int, Round]]:
    """Yield (number of the request, round) as rounds are done: of each request in order, of all interleaved.

    Joined per request, the ids are those of `Engine.decode`. A round's seconds are the table's, shared out evenly.
    Raises DataError, before anything is decoded, for a prompt that is empty or does not fit the target's context.
    """
    for request in requests:
        room(engine.target, request.prompt, request.max_new_tokens)
    table, number_of = Table(engine, max(1, min(places, len(requests)))), dict[Seat, int]()
    waiting = deque(enumerate(requests))
    while waiting or table.seats:
        while waiting and not table.full:
            number, request = waiting.popleft()
            seat, event = table.sit(request)
            number_of[seat] = number
            yield number, event
        if table.seats:
            for seat, event in table.step():
                if seat.error:
                    raise seat.error
                yield number_of[seat], event


def collect(count: int, events: Iterable[tuple[int, Round]]) -> Decoded:
    """Rounds of many answers, put together."""
    answers: Answers = [[] for _ in range(count)]
    emitted = []
    for number, event in events:
        answers[number] += event.new_ids
        if event.kind == "draft":
            emitted.append(len(event.new_ids))
    return answers, emitted


def batched(engine: Engine, seats: int, prompts: Answers) -> Decoded:
    """All prompts on so many seats."""
    return collect(len(prompts), decode_all(engine, [Request(ids, Sampler(), NEW) for ids in prompts], seats))


def one_by_one(prompts: Answers, decode: Callable[[list[int]], Iterable[Round]]) -> Decoded:
    """Each prompt alone."""
    return collect(len(prompts), ((number, event) for number, ids in enumerate(prompts) for event in decode(ids)))


def generated(target: Target, prompts: Answers, seats: int) -> Decoded:
    """`model.generate` on left-padded batches, which last as long as their longest answer."""
    answers: Answers = []
    for start in range(0, len(prompts), seats):
        part = prompts[start : start + seats]
        widest = max(map(len, part))
        ids_BT = torch.tensor([[0] * (widest - len(ids)) + ids for ids in part], device=target.device)
        mask_BT = torch.tensor([[0] * (widest - len(ids)) + [1] * len(ids) for ids in part], device=target.device)
        out_BT = target.model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=NEW, do_sample=False)
        for row in out_BT[:, widest:].tolist():
            ends = [place for place, token in enumerate(row) if token in target.stop_ids]
            answers.append(row[: ends[0] + 1] if ends else row)
    return answers, []


def race(lanes: dict[str, Callable[[], Decoded]], repeats: int) -> list[dict[str, Any]]:
    """A row per lane; a first, uncounted run of the engine warms up and tells what the answers should be."""
    expected, _ = lanes["engine"]()
    rates: dict[str, list[float]] = {name: [] for name in lanes}
    found: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats):
        for name in list(lanes)[:: -1 if repeat % 2 else 1]:
            begun = time.perf_counter()
            answers, emitted = lanes[name]()
            rates[name].append(sum(map(len, answers)) / (time.perf_counter() - begun))
            equal = sum(ids == own for ids, own in zip(answers, expected, strict=True))
            tau = statistics.fmean(emitted) if emitted else None
            found[name] = {"prompts": len(answers), "equal": equal, "tokens_per_round": tau}
    return [{"lane": name, "tokens_per_s": statistics.median(rates[name]), **found[name]} for name in lanes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seats", type=int, nargs="+", default=[2, 4, 8])
    options, rest = parser.parse_known_args()
    files = [Path(text) for text in rest if "=" not in text]
    recipe = load_recipe(files[0] if files else None, [text for text in rest if "=" in text])
    target, run = load_target(recipe.target), Path("runs") / recipe.name
    engine = Run(recipe, run).engine(target)
    questions = held_out(run, recipe.target.model)[: options.prompts]
    prompts = [first_prompt(target, question) for question in questions]
    lanes: dict[str, Callable[[], Decoded]] = {
        "plain": lambda: one_by_one(prompts, lambda ids: plain(target, ids, Sampler(), NEW)),
        "engine": lambda: one_by_one(prompts, lambda ids: engine.decode(ids, Sampler(), NEW)),
    }
    for seats in options.seats:
        lanes[f"batch {seats}"] = functools.partial(batched, engine, seats, prompts)
        lanes[f"generate {seats}"] = functools.partial(generated, target, prompts, seats)
    rows = race(lanes, options.repeats)
    speed = {str(row["lane"]): row["tokens_per_s"] for row in rows}
    figures = {
        "tokens_per_s": speed,
        "batch_over_engine": {str(seats): speed[f"batch {seats}"] / speed["engine"] for seats in options.seats},
        "batch_over_generate": {
            str(seats): speed[f"batch {seats}"] / speed[f"generate {seats}"] for seats in options.seats
        },
    }
    print(json.dumps(figures, indent=1))
    print(record("batch", figures, rows))


if __name__ == "__main__":
    main()
