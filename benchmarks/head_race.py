"""Every head on one target and drafter: tokens per round by replay, and tokens per second by decoding in turns.

A tau is a ratio of counts, so it is taken from many prompts, where the target only repeats its answers (replay.py);
what a round takes is measured on fewer, with the target itself.
Axes: N row (of the drafter's outputs, or a racer), P prompt, D hidden, V vocabulary.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import paired, replay
from coral_core.bench.acceptance import emitted_by_prompt
from coral_core.bench.probe import Probe
from coral_core.bench.race import Lane, run_lane
from coral_core.decoding.engine import Engine
from coral_core.grouping.clustering import by_kmeans, frequency_order
from coral_core.grouping.cost import predict, time_heads
from coral_core.grouping.router import first_router, recall, train_router
from coral_core.grouping.stage import Trial
from coral_core.head.groups import Groups
from coral_core.head.heads import FullHead, GroupedHead, Head, StaticHead
from coral_core.lent import Lent
from coral_core.run import sampler, tree_shape

GROUPS = 256
"""Where ways to group are compared."""
COUNTS = (64, 128, 256)
SHARES = (4, 8, 16)
CLUSTERINGS = ("cooccurrence", "kmeans", "frequency", "id")
"""coral's own; by the head's rows; by how frequent a token is; by its number (the control)."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A head in the race."""

    method: str
    share: int
    head: Head
    facts: dict[str, Any]


Routed = Callable[[Trial, Lent], Iterator[Entry]]
"""The routed heads of a comparison."""


def controls(trial: Trial, lent: Lent) -> Iterator[Entry]:
    """The full head, and static lists at every share of the vocabulary."""
    vocabulary = lent.head_VD.shape[0]
    yield Entry("full", 1, FullHead(lent), {"rows_read": vocabulary})
    order_V = frequency_order(trial.count_V)
    for share in SHARES:
        rows_read = vocabulary // share
        yield Entry("static", share, StaticHead(lent, order_V[:rows_read]), {"rows_read": rows_read})


def by_clustering(trial: Trial, lent: Lent) -> Iterator[Entry]:
    """Every way to group, at every share; coral's own with the paper's router too."""
    for clustering in CLUSTERINGS:
        groups = _clustered(trial, clustering)
        yield from _routed(clustering, trial, lent, groups, inner=False)
        if clustering == "cooccurrence":
            yield from _routed(f"{clustering}, the paper's router", trial, lent, groups, inner=True)


def by_groups(trial: Trial, lent: Lent) -> Iterator[Entry]:
    """coral's own way, in numbers of groups, at every share."""
    for count in COUNTS:
        yield from _routed(f"{count} groups", trial, lent, trial.cluster(count), inner=False)


def _clustered(trial: Trial, clustering: str) -> Groups:
    if clustering == "cooccurrence":
        return trial.cluster(GROUPS)
    if clustering == "kmeans":
        return by_kmeans(trial.lent.head_VD, GROUPS, count_V=trial.count_V, progress=trial.progress)
    order_V = frequency_order(trial.count_V)
    return Groups.from_order(order_V if clustering == "frequency" else order_V.sort().values, GROUPS)


def _routed(method: str, trial: Trial, lent: Lent, groups: Groups, *, inner: bool) -> Iterator[Entry]:
    router = first_router(groups, trial.lent, inner=inner)
    train_router(router, trial.rows, groups, trial.recipe.head, seed=0, progress=trial.progress)
    head = GroupedHead(lent, groups, copy.deepcopy(router), 1)
    for share in SHARES:
        active = groups.count // share
        sized = copy.copy(head)  # one copy of the rows serves all sizes
        sized.active = active
        found = recall(router, trial.unseen, groups, active, trial.drafted_SN)
        yield Entry(method, share, sized, {"rows_read": groups.start_G[active], "recall": found})


def taus(probe: Probe, trial: Trial, racers: list[Entry], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """By head, tokens per round on these prompts, and what share of the full head's that is."""
    target, recipe = probe.target, probe.recipe
    drafter = copy.deepcopy(trial.drafter).to(target.device, target.dtype)
    picks, limit, shape = sampler(recipe), recipe.decode.max_new_tokens, tree_shape(recipe.decode)
    tokens_NP, rounds_NP = np.zeros((len(racers), len(prompts))), np.zeros((len(racers), len(prompts)))
    for number, answer in enumerate(replay.plain_answers(target, prompts, picks, limit)):
        repeating = replay.repeating(target, prompts[number], answer, trial.drafter.config.taps)
        for place, racer in enumerate(racers):
            engine = Engine(repeating, drafter, racer.head, shape)
            (emitted,) = emitted_by_prompt(engine, prompts[number : number + 1], picks, limit)
            tokens_NP[place, number], rounds_NP[place, number] = sum(emitted), len(emitted)
        trial.progress("count rounds", number + 1, len(prompts), {})
    counts: list[paired.Counts] = list(zip(tokens_NP[:, None], rounds_NP[:, None], strict=True))
    return [
        {
            "tau": paired.tau(own),
            "tau_kept": paired.ratio(own, counts[0]),
            "tau_kept_ci95": paired.ratio_ci95(own, counts[0]),
            "tau_prompts": len(prompts),
            "tau_rounds": int(own[1].sum()),
        }
        for own in counts
    ]


def race(probe: Probe, trial: Trial, racers: list[Entry], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Decode each prompt with each head, a different one first each time; one row per head."""
    target, recipe = probe.target, probe.recipe
    drafter = copy.deepcopy(trial.drafter).to(target.device, target.dtype)
    engines = [Engine(target, drafter, racer.head, tree_shape(recipe.decode)) for racer in racers]
    lanes: list[list[Lane]] = [[] for _ in racers]
    for engine in engines:
        run_lane(engine.decode(prompts[0], sampler(recipe), 8))
    for number, prompt in enumerate(prompts):
        for turn in range(len(racers)):
            place = (turn + number) % len(racers)
            decoded = engines[place].decode(prompt, sampler(recipe), recipe.decode.max_new_tokens)
            lanes[place].append(run_lane(decoded))
        trial.progress("race the heads", number + 1, len(prompts), {})
    return [_row(racer, own, lanes[0]) for racer, own in zip(racers, lanes, strict=True)]


def _row(racer: Entry, own: list[Lane], full: list[Lane]) -> dict[str, Any]:
    def per_s(lanes: list[Lane]) -> float:
        return sum(sum(lane.emitted) for lane in lanes) / sum(lane.decode_s for lane in lanes)

    def round_s(lanes: list[Lane]) -> float:
        return sum(lane.decode_s for lane in lanes) / max(1, sum(len(lane.emitted) for lane in lanes))

    rounds = sum(len(lane.emitted) for lane in own)
    seconds: dict[str, float] = {}
    for lane in own:
        for phase, value in lane.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    return {
        "method": racer.method,
        "share": racer.share,
        **racer.facts,
        "answers": len(own),
        "equal_to_full": sum(mine.ids == theirs.ids for mine, theirs in zip(own, full, strict=True)),
        "rounds": rounds,
        "tokens_per_s": per_s(own),
        "gain": per_s(own) / per_s(full),
        "round_ms": 1e3 * round_s(own),
        "round_of_full": round_s(own) / round_s(full),
        "ms_by_phase": {phase: 1e3 * value / max(1, rounds) for phase, value in seconds.items()},
    }


def predictions(probe: Probe, trial: Trial, racers: list[Entry]) -> dict[tuple[str, int], dict[str, float]]:
    """What the cost model says of each routed head, from rounds with the full one on the same prompts."""
    cost = probe.measure(trial.drafter)
    hidden_ND = trial.unseen.hidden_SND.flatten(0, 1)[: cost.level_rows].to(probe.target.device, probe.target.dtype)
    seconds = time_heads([racer.head for racer in racers], hidden_ND, cost)
    return {
        (racer.method, racer.share): dataclasses.asdict(
            predict(cost, full_call_s=seconds[0], call_s=call_s, kept=racer.facts["recall"]["kept"])
        )
        for racer, call_s in zip(racers, seconds, strict=True)
        if "recall" in racer.facts
    }
