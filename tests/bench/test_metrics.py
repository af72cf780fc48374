"""The numbers of a bench, against a case computed by hand."""

import dataclasses

import pytest

from coral_core.bench.metrics import accepted_by_depth, plain_speeds, question_speedups, summarise
from coral_core.bench.race import Lane, Turn, run_lane
from coral_core.decoding.rounds import Round

SLOW = Lane(list(range(9)), 0.5, 4.0, [], [], {"step": 3.9})
FAST = Lane(list(range(9)), 0.5, 1.0, [2, 3, 1], [3, 4, 1], {"draft": 0.3, "other": 0.05, "verify": 0.6})


def turn(question: str, plain: Lane = SLOW, fast: Lane = FAST) -> Turn:
    return Turn(question, 0, 5, {"plain": plain, "m": fast}, {"m": None})


def test_one_question_by_hand() -> None:
    numbers = summarise([[turn("a")]], "m")
    assert numbers["rounds"] == 3
    assert numbers["tokens_per_round_micro"] == pytest.approx(8 / 3)
    assert numbers["tokens_per_s"] == 8.0  # the prefill's token is not counted, nor its half second
    assert numbers["baseline_tokens_per_s"] == 2.0
    assert numbers["speedup"] == 4.0
    assert numbers["speedup_ci95"] is None  # one question shows no spread
    assert list(numbers["seconds_by_phase"]) == ["draft", "verify", "other"]
    assert numbers["seconds_by_phase"] == pytest.approx({"draft": 0.3, "verify": 0.6, "other": 0.1})
    assert numbers["lossless"] == {"checked": 1, "equal": 1, "ties": 0, "first_divergence": None}


def test_micro_weighs_rounds_and_macro_weighs_questions() -> None:
    poor = dataclasses.replace(FAST, ids=[1, 2], accepted_drafts=[0], emitted=[1])
    numbers = summarise([[turn("a")], [turn("b", fast=poor)]], "m")
    assert numbers["tokens_per_round_micro"] == pytest.approx(9 / 4)
    assert numbers["tokens_per_round_macro"] == pytest.approx((8 / 3 + 1) / 2)
    low, high = numbers["speedup_ci95"]
    assert low <= numbers["speedup"] <= high


def test_the_plain_decoder_that_is_fastest_over_all_questions_is_the_baseline() -> None:
    """Here the second wins the first question, and the third the bench: not the first found, nor the slowest."""
    lanes = [
        {"plain": SLOW, "m": FAST, "generate": timed(1.5), "plain bfloat16": timed(2.0)},
        {"plain": SLOW, "m": FAST, "generate": timed(3.5), "plain bfloat16": timed(2.0)},
    ]
    raced = [[dataclasses.replace(turn(name), lanes=own)] for name, own in zip("ab", lanes, strict=True)]
    assert plain_speeds(raced) == pytest.approx({"plain bfloat16": 4.0, "generate": 3.2, "plain": 2.0})
    assert list(plain_speeds(raced)) == ["plain bfloat16", "generate", "plain"]
    numbers = summarise(raced, "m")
    assert (numbers["speedup"], numbers["baseline_tokens_per_s"]) == (2.0, 4.0)
    assert numbers["speedup_ci95"] == [2.0, 2.0]
    assert question_speedups(raced, "m") == {"a": 2.0, "b": 2.0}


def timed(decode_s: float) -> Lane:
    return dataclasses.replace(SLOW, decode_s=decode_s)


def test_a_difference_is_counted_and_shown() -> None:
    odd = dataclasses.replace(turn("b"), divergence={"m": {"position": 3, "logit_gap": 1e-3, "tie": True}})
    bug = dataclasses.replace(turn("c"), divergence={"m": {"position": 4, "logit_gap": 2.0, "tie": False}})
    lossless = summarise([[turn("a")], [odd], [bug]], "m")["lossless"]
    assert (lossless["checked"], lossless["equal"], lossless["ties"]) == (3, 1, 1)
    assert lossless["first_divergence"] == {"question": "b", "turn": 0, **odd.divergence["m"]}


def test_acceptance_by_depth() -> None:
    assert accepted_by_depth([2, 3, 1, 0]) == [0.75, 0.5, 0.25]
    assert accepted_by_depth([]) == []


def test_an_answer_of_one_token_has_no_round() -> None:
    short = Lane([1], 0.5, 0.0, [], [], {})
    numbers = summarise([[turn("a", plain=short, fast=short)], []], "m")
    assert numbers["tokens_per_round_micro"] is None
    assert numbers["speedup"] is None


def test_the_two_speedups_weigh_a_long_answer_differently() -> None:
    """80 tokens at 4 times and 8 tokens at 1 time the plain speed: 88 tokens in 18 s against 44 s; mean (4 + 1) / 2."""
    long_plain = Lane(list(range(81)), 0.1, 40.0, [], [], {})
    long_fast = Lane(list(range(81)), 0.1, 10.0, [3] * 20, [4] * 20, {})
    even = dataclasses.replace(FAST, decode_s=4.0)
    raced = [[turn("long", long_plain, long_fast)], [turn("short", fast=even)]]
    numbers = summarise(raced, "m")
    assert numbers["speedup"] == pytest.approx(44 / 14)
    assert numbers["speedup_mean"] == pytest.approx(2.5)
    assert numbers["speedup_mean_ci95"] == [1.0, 4.0]
    assert question_speedups([*raced, []], "m") == {"long": 4.0, "short": 1.0}


def test_prefill_is_apart() -> None:
    numbers = summarise([[turn("a"), turn("a", fast=dataclasses.replace(FAST, prefill_s=0.7))]], "m")
    assert numbers["prefill_s"] == pytest.approx(1.2)
    assert numbers["baseline_prefill_s"] == pytest.approx(1.0)


def test_rounds_are_counted_by_kind() -> None:
    rounds = [Round([1], "prefill"), Round([2], "plain"), Round([3, 4], "copy", 1), Round([5, 6], "draft", 1)]
    lane = run_lane([*rounds, Round([7], "copy")])
    assert (lane.plain_rounds, lane.copied_rounds) == (1, 2)
    numbers = summarise([[turn("a", fast=lane)]], "m")
    assert (numbers["rounds"], numbers["plain_rounds"], numbers["copied_rounds"]) == (4, 1, 2)
