"""The cost model, by hand."""

import pytest
import torch

from coral_core.grouping.cost import RoundCost, hit_rates, predict, time_calls

COST = RoundCost(hit_rates=[0.8, 0.5], round_s=0.1, head_s=0.04, head_calls=4, level_rows=5)


def test_how_often_a_round_goes_on() -> None:
    assert hit_rates([0, 1, 1, 3]) == [3 / 4, 1 / 3, 1.0]
    assert hit_rates([0, 0]) == []


def test_the_full_head_is_predicted_as_it_was_measured() -> None:
    found = predict(COST, full_call_s=0.009, call_s=0.009, kept=1.0)
    assert found.tokens_per_round == pytest.approx(1 + 0.8 + 0.4)
    assert found.round_s == pytest.approx(0.1)
    assert found.speedup == pytest.approx(1.0)


def test_a_head_four_times_as_fast_that_keeps_nine_tenths() -> None:
    found = predict(COST, full_call_s=0.008, call_s=0.002, kept=0.9)
    assert found.tokens_per_round == pytest.approx(1 + 0.72 + 0.72 * 0.45)
    assert found.round_s == pytest.approx(0.07)
    assert found.speedup == pytest.approx((2.044 / 0.07) / (2.2 / 0.1))


def test_calls_take_turns() -> None:
    order: list[str] = []
    seconds = time_calls([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), repeats=3)
    assert order == ["a", "b"] * 5
    assert all(value > 0 for value in seconds)
