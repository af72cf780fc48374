"""The numbers of a bench, with their definitions.

tokens_per_round (tau) counts the bonus token; the prefill's own token belongs to no round. Speeds leave the prefill
out and are new tokens after the first, over seconds.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from coral_core.bench.race import PLAIN, Lane, Turn

DRAWS = 2000
"""Bootstrap resamples."""

Sample = TypeVar("Sample")


def summarise(questions: Sequence[Sequence[Turn]], method: str, draws: int = DRAWS) -> dict[str, Any]:
    """One method's numbers on one bench, as results.json holds them.

    `questions` are lists of turns; an empty one did not fit the context and counts as nothing. `draws` resamples make
    the intervals.
    """
    questions = [turns for turns in questions if turns]
    turns = [turn for question in questions for turn in question]
    plain = fastest_plain(questions)
    drafted, baselines = [turn.lanes[method] for turn in turns], [turn.lanes[plain] for turn in turns]
    emitted = [n for lane in drafted for n in lane.emitted]
    speeds = _speed(drafted), _speed(baselines)
    ratios = list(question_speedups(questions, method).values())
    return {
        "questions": len(questions),
        "turns": len(turns),
        "new_tokens": sum(len(lane.ids) for lane in drafted),
        "rounds": len(emitted),
        "plain_rounds": sum(lane.plain_rounds for lane in drafted),
        "copied_rounds": sum(lane.copied_rounds for lane in drafted),
        "tokens_per_round_micro": statistics.fmean(emitted) if emitted else None,
        "tokens_per_round_macro": _macro(questions, method),
        "accepted_by_depth": accepted_by_depth([n for lane in drafted for n in lane.accepted_drafts]),
        "tokens_per_s": speeds[0],
        "baseline_tokens_per_s": speeds[1],
        "plain_tokens_per_s": _speed([turn.lanes[PLAIN] for turn in turns]),
        "speedup": speeds[0] / speeds[1] if speeds[0] and speeds[1] else None,
        "speedup_ci95": _interval(
            [_totals(question, method, plain) for question in questions], _ratio_of_totals, draws
        ),
        "speedup_mean": statistics.fmean(ratios) if ratios else None,
        "speedup_mean_ci95": _interval(ratios, statistics.fmean, draws),
        "lossless": _lossless(turns, method),
        "prefill_s": sum(lane.prefill_s for lane in drafted),
        "baseline_prefill_s": sum(lane.prefill_s for lane in baselines),
        "seconds_by_phase": _phases(drafted),
    }


def plain_speeds(questions: Sequence[Sequence[Turn]]) -> dict[str, float]:
    """Tokens/s of every plain lane over all questions, fastest first; without those whose answers have no tokens."""
    turns = [turn for question in questions for turn in question]
    names = turns[0].plain_lanes if turns else []
    speeds = {name: _speed([turn.lanes[name] for turn in turns]) for name in names}
    found = {name: speed for name, speed in speeds.items() if speed is not None}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def fastest_plain(questions: Sequence[Sequence[Turn]]) -> str:
    """The lane over which speedups are: of the plain ones, the fastest over all questions."""
    return next(iter(plain_speeds(questions)), PLAIN)


def question_speedups(questions: Sequence[Sequence[Turn]], method: str) -> dict[str, float]:
    """Each question's own ratio of tokens/s; questions whose answers have one token only are left out."""
    found, name = {}, fastest_plain(questions)
    for question in filter(None, questions):
        fast, plain = (_speed([turn.lanes[lane] for turn in question]) for lane in (method, name))
        if fast and plain:
            found[question[0].question] = fast / plain
    return found


def accepted_by_depth(accepted: Sequence[int]) -> list[float]:
    """Share of rounds in which the draft was right down to depth 1, 2, …"""
    return [sum(n >= depth for n in accepted) / len(accepted) for depth in range(1, max(accepted, default=0) + 1)]


def _speed(lanes: Sequence[Lane]) -> float | None:
    seconds, tokens = sum(lane.decode_s for lane in lanes), sum(len(lane.ids) - 1 for lane in lanes)
    return tokens / seconds if tokens > 0 else None


def _macro(questions: Sequence[Sequence[Turn]], method: str) -> float | None:
    means = []
    for question in questions:
        emitted = [n for turn in question for n in turn.lanes[method].emitted]
        if emitted:
            means.append(statistics.fmean(emitted))
    return statistics.fmean(means) if means else None


def _totals(question: Sequence[Turn], method: str, plain: str) -> tuple[float, ...]:
    """Tokens and seconds drafted, tokens and seconds plain."""

    def both(lanes: list[Lane]) -> Iterator[float]:
        yield sum(len(lane.ids) - 1 for lane in lanes)
        yield sum(lane.decode_s for lane in lanes)

    return (*both([turn.lanes[method] for turn in question]), *both([turn.lanes[plain] for turn in question]))


def _ratio_of_totals(totals: Sequence[tuple[float, ...]]) -> float | None:
    fast_n, fast_s, plain_n, plain_s = (sum(part) for part in zip(*totals, strict=True))
    return (fast_n / fast_s) / (plain_n / plain_s) if fast_n and plain_n else None


def _interval(
    samples: Sequence[Sample], statistic: Callable[[list[Sample]], float | None], draws: int
) -> list[float] | None:
    """The middle 95 % of a statistic over resampled questions; None with fewer than two questions."""
    if len(samples) < 2:
        return None
    draw = random.Random(0)
    drawn = (statistic(draw.choices(samples, k=len(samples))) for _ in range(draws))
    found = sorted(value for value in drawn if value is not None)
    return [found[int(0.025 * len(found))], found[int(0.975 * len(found))]] if found else None


def _lossless(turns: Sequence[Turn], method: str) -> dict[str, Any]:
    parted = [(turn, where) for turn in turns if (where := turn.divergence[method])]
    first = next(({"question": turn.question, "turn": turn.turn, **where} for turn, where in parted), None)
    return {
        "checked": len(turns),
        "equal": len(turns) - len(parted),
        "ties": sum(where["tie"] for _, where in parted),
        "first_divergence": first,
    }


def _phases(lanes: Sequence[Lane]) -> dict[str, float]:
    """Seconds by phase; `other` comes last: the engine's own bookkeeping, and what the wall-clock holds beyond."""
    phases: dict[str, float] = {}
    for lane in lanes:
        for phase, seconds in lane.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    phases.pop("other", None)
    phases["other"] = sum(lane.decode_s for lane in lanes) - sum(phases.values())
    return phases
