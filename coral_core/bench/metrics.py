"""The numbers of a bench, with their definitions.

tokens_per_round (tau) counts the bonus token; the prefill's own token belongs to no round. Speeds leave the prefill
out and are new tokens after the first, over seconds; the speedup is a ratio of totals.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Any

from coral_core.bench.race import Lane, Turn

DEFINITIONS = (
    "tau: tokens per round, bonus token included; micro = all tokens / all rounds, macro = mean over questions.",
    "tokens/s: tokens after the first / seconds after the prefill. speedup: ratio of the two tokens/s over the whole "
    "bench, with a bootstrap 95 % interval over questions.",
    "lossless: answers whose speculative ids equal plain decoding's, token for token.",
)
DRAWS = 2000
"""Bootstrap resamples."""


def summarise(questions: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """One bench's numbers, as results.json holds them. `questions` are lists of turns; empty ones count as nothing."""
    questions = [turns for turns in questions if turns]
    turns = [turn for question in questions for turn in question]
    emitted = [n for turn in turns for n in turn.speculative.emitted]
    baselines = [turn.baseline or turn.plain for turn in turns]
    speeds = _speed([turn.speculative for turn in turns]), _speed(baselines)
    return {
        "questions": len(questions),
        "turns": len(turns),
        "new_tokens": sum(len(turn.speculative.ids) for turn in turns),
        "rounds": len(emitted),
        "tokens_per_round_micro": statistics.fmean(emitted) if emitted else None,
        "tokens_per_round_macro": _macro(questions),
        "accepted_by_depth": accepted_by_depth([n for turn in turns for n in turn.speculative.accepted_drafts]),
        "tokens_per_s": speeds[0],
        "baseline_tokens_per_s": speeds[1],
        "plain_tokens_per_s": _speed([turn.plain for turn in turns]),
        "speedup": speeds[0] / speeds[1] if speeds[0] and speeds[1] else None,
        "speedup_ci95": _interval(questions),
        "lossless": _lossless(turns),
        "prefill_s": sum(turn.speculative.prefill_s for turn in turns),
        "seconds_by_phase": _phases([turn.speculative for turn in turns]),
    }


def accepted_by_depth(accepted: Sequence[int]) -> list[float]:
    """Share of rounds in which the draft was right down to depth 1, 2, …"""
    return [sum(n >= depth for n in accepted) / len(accepted) for depth in range(1, max(accepted, default=0) + 1)]


def _speed(lanes: Sequence[Lane]) -> float | None:
    seconds, tokens = sum(lane.decode_s for lane in lanes), sum(len(lane.ids) - 1 for lane in lanes)
    return tokens / seconds if tokens > 0 else None


def _macro(questions: Sequence[Sequence[Turn]]) -> float | None:
    means = []
    for question in questions:
        emitted = [n for turn in question for n in turn.speculative.emitted]
        if emitted:
            means.append(statistics.fmean(emitted))
    return statistics.fmean(means) if means else None


def _interval(questions: Sequence[Sequence[Turn]]) -> list[float] | None:
    """Bootstrap over questions of the ratio of totals; None with fewer than two questions."""
    sums = []
    for question in questions:
        plain = [turn.baseline or turn.plain for turn in question]
        fast = [turn.speculative for turn in question]
        sums.append(
            tuple(
                value
                for lanes in (fast, plain)
                for value in (sum(len(lane.ids) - 1 for lane in lanes), sum(lane.decode_s for lane in lanes))
            )
        )
    if len(sums) < 2:
        return None
    draw, ratios = random.Random(0), []
    for _ in range(DRAWS):
        fast_n, fast_s, plain_n, plain_s = (sum(part) for part in zip(*draw.choices(sums, k=len(sums)), strict=True))
        if fast_n and plain_n:
            ratios.append((fast_n / fast_s) / (plain_n / plain_s))
    ratios.sort()
    return [ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios))]] if ratios else None


def _lossless(turns: Sequence[Turn]) -> dict[str, Any]:
    first = next((turn for turn in turns if turn.divergence), None)
    where = None if first is None else {"question": first.question, "turn": first.turn, **(first.divergence or {})}
    return {
        "checked": len(turns),
        "equal": sum(turn.divergence is None for turn in turns),
        "first_divergence": where,
    }


def _phases(lanes: Sequence[Lane]) -> dict[str, float]:
    """Seconds by phase; `other` is what the wall-clock holds beyond the phases."""
    phases: dict[str, float] = {}
    for lane in lanes:
        for phase, seconds in lane.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    phases["other"] = sum(lane.decode_s for lane in lanes) - sum(phases.values())
    return phases
