"""The rows of the EAGLE-3 benchmark: each is a training that exists, and the figures compare the right ones."""

import dataclasses

import pytest

from benchmarks import eagle3
from coral_core.recipe.schema import PRESETS, UNSET, TrainSpec


class FakeBench:
    """Knows what a step costs."""


def row(name: str, tokens: int, part: str = "shape", seed: int = 0) -> dict:
    return {"part": part, "name": name, "seed": seed, "tokens": [tokens, tokens], "rounds": [10, 10]}


def test_every_row_is_a_training() -> None:
    for name in eagle3.ROWS:
        keys = {**UNSET, **PRESETS["coral"], **dict(eagle3.variant(name, 0, 9).changes)}
        spec = dataclasses.replace(TrainSpec(), **keys)  # type: ignore[arg-type]
        assert (spec.shape != "eagle2") == (name in eagle3.WIDE)
        assert spec.unroll_growth == 0


def test_figures_compare_the_best_wide_row_with_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle3, "step_seconds", lambda bench: {"a coral today": 1.0})
    names = list(eagle3.ROWS)
    found = [row(name, 20 + place) for place, name in enumerate(names)]
    told = eagle3.figures(FakeBench(), found)  # type: ignore[arg-type]
    assert told["best"] == names[-1]
    assert told["eagle3_over_eagle2_shape"] == pytest.approx((20 + len(names) - 1) / 20)
    assert told["csra_on_eagle3"] == pytest.approx(24 / 23)
    assert "eagle3_over_eagle2_shape_equal_time" not in told
    told = eagle3.figures(FakeBench(), [*found, row("a coral today", 22, part="equal time")])  # type: ignore[arg-type]
    assert told["eagle3_over_eagle2_shape_equal_time"] == pytest.approx((20 + len(names) - 1) / 22)
    longer = [row("a coral today", 30, part="longer"), row(names[-1], 33, part="longer")]
    longer.append(row("a coral today", 32, part="longer, equal time"))
    told = eagle3.figures(FakeBench(), [*found, *longer])  # type: ignore[arg-type]
    assert told["eagle3_over_eagle2_shape_longer"] == pytest.approx(33 / 30)
    assert told["eagle3_over_eagle2_shape_longer_equal_time"] == pytest.approx(33 / 32)
    assert eagle3.figures(FakeBench(), found[:2]) == {"step_s": {"a coral today": 1.0}}  # type: ignore[arg-type]


def test_the_grouped_head_is_compared_with_the_whole_one_of_the_same_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle3, "step_seconds", lambda bench: {})
    best = eagle3.WIDE[-1]
    found = [row(best, 40), row(best, 38, part="grouped")]
    assert eagle3.figures(FakeBench(), found)["grouped_tau_kept"] == pytest.approx(38 / 40)  # type: ignore[arg-type]
    assert eagle3.best_row([row(name, 20) for name in eagle3.WIDE[:2]] + found[:1], eagle3.WIDE[:2]) in eagle3.WIDE[:2]


def test_rounds_are_counted_by_the_depth_that_they_accept() -> None:
    assert eagle3.by_depth([[0, 1, 4], [2]]) == [3, 2, 1, 1]
