"""Every way to decode the same prompts, in turns, in one process: transformers' own ways, our plain loop, our engine.

All are greedy. Tokens per second leave out the prefill and what it emits; a lane of transformers is timed through its
streamer, of which a call is a round.
Axes: B batch of one, T position, P prompt.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.decode_compiled import Compiled
from benchmarks.paired import ratio_ci95
from coral_core.bench.methods import Method
from coral_core.bench.race import Decode, Lane, run_lane
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.sampling import Sampler
from coral_core.target.target import Target

LOOKUP_TOKENS = 10
"""Drafted tokens of prompt lookup: what transformers' documentation shows."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A lane of the race."""

    name: str
    kind: str
    """plain, compiled (plain too), transformers (its speculative ways), or coral."""
    dtype: str
    decode: Decode
    facts: dict[str, Any]


class _Puts(BaseStreamer):
    """Notes when tokens come, and how many."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.at_s.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass


def generated(target: Target, prompt: list[int], max_new_tokens: int, model: Any = None, **options: Any) -> Lane:
    """`generate` of the target's model, or of a copy; `options` choose its way of decoding."""
    puts, ids_BT = _Puts(), torch.tensor([prompt], device=target.device)
    begun_s = time.perf_counter()
    out_BT = (model or target.model).generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=min(max_new_tokens, target.max_positions - len(prompt)),
        streamer=puts,
        **{"do_sample": False, "repetition_penalty": 1.0, **options},
    )
    ended_s = time.perf_counter()
    first_s = puts.at_s[1]  # the first call hands over the prompt
    emitted = puts.counts[2:]
    drafts = [count - 1 for count in emitted]
    return Lane(out_BT[0, len(prompt) :].tolist(), first_s - begun_s, ended_s - first_s, drafts, emitted, {})


def untouched(model: Any) -> Any:
    """The model as transformers makes it: with its own products, norms and attention."""
    config = copy.deepcopy(model.config)  # which attention is used stands there, the target's own too
    own = type(model)._from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    own.load_state_dict(model.state_dict())
    return own.to(model.device).eval()


def first_layers(model: Any, layers: int) -> Any:
    """A draft model where none was ever trained: the target's own first layers, untouched, with its norm and head."""
    short = copy.deepcopy(model)
    short.base_model.layers = short.base_model.layers[:layers]
    short.config.num_hidden_layers = layers
    if getattr(short.config, "layer_types", None):
        short.config.layer_types = short.config.layer_types[:layers]
    return short


def entries(target: Target, methods: dict[str, Method], tokens: int, assistant_layers: int) -> Iterator[Entry]:
    """All lanes on one form of the target; `methods` by "drafter head"."""
    dtype = str(target.dtype).removeprefix("torch.")

    def lane(name: str, kind: str, decode: Callable[[list[int]], Lane], **facts: Any) -> Entry:
        return Entry(f"{name} {dtype}", kind, dtype, decode, {"method": name, **facts})

    def generate(**options: Any) -> Callable[[list[int]], Lane]:
        return lambda prompt: generated(target, prompt, tokens, **options)

    yield lane("plain", "plain", lambda prompt: run_lane(plain(target, prompt, Sampler(), tokens)))
    yield lane("generate", "plain", generate())
    yield lane("generate, untouched model", "plain", generate(model=untouched(target.model)))
    yield lane("prompt lookup", "transformers", generate(prompt_lookup_num_tokens=LOOKUP_TOKENS))
    if assistant_layers:
        short = first_layers(target.model, assistant_layers)
        what = f"the target's first {assistant_layers} layers, untrained as a model"
        yield lane("assisted", "transformers", generate(assistant_model=short), draft_model=what)
    for name, method in methods.items():

        def decode(prompt: list[int], engine: Engine = method.engine) -> Lane:
            return run_lane(engine.decode(prompt, Sampler(), tokens))

        yield lane(name, "coral", decode, **{key: value for key, value in method.facts.items() if key != "method"})


def compiled_entry(target: Target, tokens: int, longest: int, backend: str = "inductor") -> Entry:
    """A plain lane of an untouched model, compiled, for prompts of at most `longest` tokens."""
    dtype = str(target.dtype).removeprefix("torch.")
    lane = Compiled(target, untouched(target.model), longest + tokens, backend)
    facts = {"method": "compiled", "compiler": backend, "cache": "static"}
    return Entry(f"compiled {dtype}", "compiled", dtype, lambda prompt: lane.decode(prompt, tokens), facts)


def race(racers: Sequence[Entry], prompts: Sequence[list[int]], told: Callable[[int], None]) -> list[dict[str, Any]]:
    """Decode each prompt in each lane, another one first each time; one row per lane."""
    for racer in racers:
        racer.decode(prompts[0])
    lanes: dict[str, list[Lane]] = {racer.name: [] for racer in racers}
    for number, prompt in enumerate(prompts):
        first = number % len(racers)
        for racer in (*racers[first:], *racers[:first]):
            lanes[racer.name].append(racer.decode(prompt))
        told(number + 1)
    best = max((racer.name for racer in racers if racer.kind == "plain"), key=lambda name: speed(lanes[name]))
    return [_row(racer, lanes, best) for racer in racers]


def _row(racer: Entry, lanes: dict[str, list[Lane]], best: str) -> dict[str, Any]:
    own, same = lanes[racer.name], lanes[f"plain {racer.dtype}"]
    row = {"part": "race", "lane": racer.name, "kind": racer.kind, "dtype": racer.dtype, **racer.facts}
    row |= {"answers": len(own), "equal": sum(a.ids == b.ids for a, b in zip(own, same, strict=True))}
    row |= {**per_round(own), "tokens_per_s": speed(own), "over_best_plain": speed(own) / speed(lanes[best])}
    row["over_best_plain_ci95"] = ratio_ci95(_counts(own), _counts(lanes[best]))
    return row | {"best_plain": best}


def speed(lanes: Sequence[Lane]) -> float:
    """Tokens after the prefill's own over seconds after the prefill."""
    return sum(sum(lane.emitted) for lane in lanes) / sum(lane.decode_s for lane in lanes)


def _counts(lanes: Sequence[Lane]) -> tuple[np.ndarray, np.ndarray]:
    tokens_P, seconds_P = ([sum(lane.emitted) for lane in lanes], [lane.decode_s for lane in lanes])
    return np.array([tokens_P], float), np.array([seconds_P], float)


def per_round(lanes: Sequence[Lane]) -> dict[str, Any]:
    """Tau, milliseconds of a round by phase (prefill: of an answer), and the share of `other` in a round."""
    rounds = max(1, sum(len(lane.emitted) for lane in lanes))
    decode_s = sum(lane.decode_s for lane in lanes)
    phases: dict[str, float] = {}
    for lane in lanes:
        for phase, value in lane.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + value
    phases.pop("other", None)
    other_s = decode_s - sum(phases.values())
    found: dict[str, Any] = {
        "rounds": rounds,
        "tau": sum(sum(lane.emitted) for lane in lanes) / rounds,
        "round_ms": 1e3 * decode_s / rounds,
        "prefill_ms": 1e3 * sum(lane.prefill_s for lane in lanes) / len(lanes),
    }
    if phases:
        found["ms_by_phase"] = {phase: 1e3 * value / rounds for phase, value in (phases | {"other": other_s}).items()}
        found["other_share"] = other_s / decode_s
    return found
