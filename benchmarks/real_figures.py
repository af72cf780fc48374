"""What the rows of benchmarks/real.py say: `lanes` of a race, or `rounds` that were counted.

Axes: N row: a seed, P prompt.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.paired import Counts, ratio, ratio_ci95

LONG = "coral-long"
"""CORAL trained longer and on more data than the methods that are compared, and counted on questions of its own."""
STEPS = "-steps"
"""Behind a method's name: trained for as many steps as the others so named, where the plain names had equal time."""

Row = dict[str, Any]
Made = dict[str, list[str]]
"""Fingerprints of the drafter, and of its grouped head where it has one, by METHOD or METHOD@SEED."""


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What the README quotes: means over the benches, at temperature 0 unless said otherwise."""
    counted, raced = parts(rows)
    by_kind: dict[str, list[Row]] = {}
    for row in counted:
        by_kind.setdefault(f"counted, {training(row)}" if training(row) else "counted", []).append(row)
    by_kind["raced"] = raced
    found: dict[str, Any] = {"questions": {kind: asked(some) for kind, some in by_kind.items() if some}}
    found |= rounds_figures([row for row in counted if row["temperature"] == 0])
    if sampled := coral_over_others([row for row in counted if row["temperature"] == 1], STEPS):
        found["equal_steps_sampled"] = sampled  # greedy ones: equal_steps
    greedy, own = [row for row in raced if row["temperature"] == 0], ships(counted)
    found |= speed_figures(greedy, own, made_of((row for row in counted if row["temperature"] == 0), own))
    if llama := llama_figures(raced):
        found["llamacpp"] = llama
    equal = [lane["equal"] for row in raced for lane in row["lanes"].values() if "equal" in lane]
    return found | {"lossless_share": fmean(equal) if equal else None}


def parts(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows with rounds, of questions counted for all methods and heads that are compared, and those of races."""
    counted = [row for row in rows if "rounds" in row]
    by_question: dict[tuple[Any, ...], set[tuple[str, str]]] = {}
    for row in counted:
        by_question.setdefault(question(row), set()).add((row["method"], row["head"]))
    every: dict[tuple[Any, ...], set[tuple[str, str]]] = {}
    for (*among, _, _), found in by_question.items():
        every.setdefault(tuple(among), set()).update(found)
    shared = [row for row in counted if by_question[question(row)] == every[question(row)[:3]]]
    return shared, [row for row in rows if "lanes" in row]


def question(row: Row) -> tuple[Any, ...]:
    """What a row is an answer to; first the model, the temperature, and the training, which has its own questions."""
    return row.get("model"), row["temperature"], training(row), row["bench"], row["question"]


def asked(rows: Sequence[Row]) -> dict[str, int]:
    """Questions by temperature."""
    every = {(f"T = {row['temperature']:g}", row["bench"], row["question"]) for row in rows}
    return {name: sum(one[0] == name for one in every) for name in sorted({one[0] for one in every})}


# ---- rounds


def rounds_figures(counted: Sequence[Row]) -> dict[str, Any]:
    """Tau of the methods, CORAL's over the others', and what a grouped head keeps of it."""
    by_method = {name: [row for row in counted if method(row) == name] for name in sorted(map(method, counted))}
    found: dict[str, Any] = {
        "tau": {name: by_bench(some, functools.partial(tau_of, name=name)) for name, some in by_method.items()}
    }
    found |= coral_over_others(counted)
    if steps := coral_over_others(counted, STEPS):
        found["equal_steps"] = steps
    own = ships(counted)
    if any((method(row), row["head"]) == (own, "grouped") for row in counted):
        found["grouped_tau_kept"] = ratio(*paired(counted, (own, "grouped"), (own, "full")))
    return found


def coral_over_others(counted: Sequence[Row], behind: str = "") -> dict[str, Any]:
    """Tokens per round of CORAL over each of the others whose names have the same behind them, with intervals."""
    found: dict[str, Any] = {}
    for other in ("hass", "eagle2"):
        if pair := paired(counted, (f"coral{behind}", "full"), (f"{other}{behind}", "full")):
            found |= {f"coral_over_{other}": ratio(*pair), f"coral_over_{other}_ci95": ratio_ci95(*pair)}
    return found


def ships(counted: Sequence[Row]) -> str:
    """The method that speed and the grouped head are told of: CORAL's long training, where there is one."""
    return LONG if any(method(row) == LONG for row in counted) else "coral"


def method(row: Row) -> str:
    """Of a counted row."""
    return without_seed(row["method"])


def training(row: Row) -> str:
    """Of a counted row: `long`, `steps`, or nothing for equal time."""
    return method(row).partition("-")[2]


def without_seed(name: str) -> str:
    """METHOD of METHOD@SEED."""
    return name.partition("@")[0]


def tau_of(counted: Sequence[Row], name: str, head: str = "full") -> float:
    """Tokens per round of a method, over its seeds."""
    own = [row for row in counted if (method(row), row["head"]) == (name, head)]
    return sum(row["tokens"] for row in own) / sum(row["rounds"] for row in own)


def paired(counted: Sequence[Row], *pair: tuple[str, str]) -> list[Counts]:
    """Tokens and rounds [N,P] of two methods with a head each, on the seeds and questions that both have.

    Empty where they have no seed in common.
    """
    by_seed = [seeds(counted, *one) for one in pair]
    common = sorted(set.intersection(*(set(found) for found in by_seed)))
    if not common:
        return []
    prompts = sorted(set.intersection(*(set(found[seed]) for found in by_seed for seed in common)))
    cells = [[[found[seed][prompt] for prompt in prompts] for seed in common] for found in by_seed]
    return [(np.array(one)[..., 0], np.array(one)[..., 1]) for one in cells]


def seeds(counted: Sequence[Row], name: str, head: str) -> dict[str, dict[tuple[str, str], tuple[int, int]]]:
    """Tokens and rounds of a method by seed, then by question."""
    found: dict[str, dict[tuple[str, str], tuple[int, int]]] = {}
    for row in counted:
        if (method(row), row["head"]) == (name, head):
            seed = row["method"].partition("@")[2]
            found.setdefault(seed, {})[row["bench"], row["question"]] = row["tokens"], row["rounds"]
    return found


# ---- the race


def speed_figures(raced: Sequence[Row], own: str, made: Made) -> dict[str, float]:
    """A method's fastest lane and prompt lookup over the fastest plain lane; the grouped head over the full one."""
    raced = last_race(raced, lambda name: drafts_with(name) == own, made)
    names = lanes_of(raced)
    coral = [name for name in names if drafts_with(name) == own]
    plains = [name for name in names if is_plain(name)]
    lookups = [name for name in names if name.startswith("lookup")]
    grouped = [name for name in coral if " grouped " in name]
    full = [name for name in coral if name not in grouped]
    found = {}
    for figure, ahead, behind in (
        ("speedup_greedy", coral, plains),
        ("lookup_speedup_greedy", lookups, plains),
        ("grouped_gain", grouped, full),
    ):
        if ahead and behind:
            over = functools.partial(gain, ahead=ahead, behind=behind)
            found[figure] = by_bench(raced, over)
    return found


def gain(raced: Sequence[Row], ahead: Sequence[str], behind: Sequence[str]) -> float:
    """The fastest of some lanes over the fastest of others."""
    return fastest(raced, ahead) / fastest(raced, behind)


def lanes_of(raced: Sequence[Row]) -> list[str]:
    """The lanes that answered every question."""
    return [name for name in raced[0]["lanes"] if all(name in row["lanes"] for row in raced)] if raced else []


def is_ours(name: str) -> bool:
    """Whether a lane drafts with a drafter of ours, and must say what plain decoding says."""
    return name.split()[1] in ("full", "grouped")


def drafts_with(name: str) -> str:
    """The method of a lane that drafts with a drafter of ours."""
    return without_seed(name.split()[0]) if is_ours(name) else ""


def last_race(raced: Sequence[Row], wanted: Callable[[str], bool], made: Made | None = None) -> list[Row]:
    """Races of other drafters, or of other settings, stand beside each other: the last one that has a wanted lane.

    With `made`, one of these drafters, where its rows tell; rows of up to 2026-11-30 do not.
    """
    having = [row for row in raced if any(map(wanted, row["lanes"]))]
    fitting = [(is_of(row, made or {}), row["settings"]) for row in having]
    for fits in (True, None):
        if found := [settings for told, settings in fitting if told is fits]:
            return [row for row in raced if row["settings"] == found[-1]]
    return []


def is_of(raced: Row, made: Made) -> bool | None:
    """Whether a race was run with these drafters, and their heads where it had any; None where the rows do not tell."""
    pairs = [(own, made[name]) for name, own in raced.get("drafters", {}).items() if name in made]
    return all(a == b for own, other in pairs for a, b in zip(own, other, strict=False)) if pairs else None


def made_of(counted: Iterable[Row], name: str) -> Made:
    """What a method was counted with, where its rows tell."""
    found: Made = {}
    for row in counted:
        if method(row) == name and len(row.get("made", ())) > len(found.get(row["method"], ())):
            found[row["method"]] = row["made"]
    return found


def is_plain(name: str) -> bool:
    """Whether a lane drafts nothing: coral's own loop, or `generate`."""
    return name.split()[0] in ("plain", "generate")


def fastest(raced: Sequence[Row], names: Sequence[str]) -> float:
    """The speed of the fastest of some lanes."""
    return max(speed(raced, name) for name in names)


def by_bench(rows: Sequence[Row], number: Callable[[Sequence[Row]], float]) -> float:
    """The mean of a number over the benches."""
    return fmean(
        number([row for row in rows if row["bench"] == name]) for name in dict.fromkeys(r["bench"] for r in rows)
    )


def speed(raced: Sequence[Row], name: str) -> float:
    """Tokens after the first, per second after the prefill."""
    found = [row["lanes"][name] for row in raced]
    return sum(lane["tokens"] - 1 for lane in found) / sum(lane["decode_s"] for lane in found)


def llama_figures(rows: Sequence[Row]) -> dict[str, float]:
    """llama.cpp's speed, and coral's plain loop over it in the same bits."""
    greedy = [row for row in rows if "lanes" in row and row["temperature"] == 0]
    greedy = last_race(greedy, lambda name: name == "llamacpp q4")
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
