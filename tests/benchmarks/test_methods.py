"""The rows of the methods benchmark: none is measured twice, and all come in the order asked for."""

import dataclasses
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.methods import Rows
from benchmarks.methods_bench import Bench, Variant
from benchmarks.methods_time import timed, training_seconds
from coral_core.recipe.schema import PRESETS, UNSET, Recipe, TrainSpec


class FakeBench:
    """A training is decided by its seed and its changes; the preset's own weight is no change."""

    def key(self, variant: Variant) -> str:
        return f"{variant.preset} {variant.seed} {[pair for pair in variant.changes if pair != ('csra_weight', 0.1)]}"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was measured."""
    names: list[str] = []

    def measure(variant: Variant) -> methods.Row:
        names.append(variant.name)
        return {"part": variant.part, "name": variant.name, "seed": variant.seed}

    monkeypatch.setattr(methods, "_measure", measure)
    return names


def test_rows_are_measured_once_and_come_in_order(measured: list[str], tmp_path: Path) -> None:
    bench, path = FakeBench(), tmp_path / "methods.jsonl"
    own = Variant("weight", "coral", 0, 9, (("csra_weight", 0.1),))
    wanted = [
        Variant("methods", "hass", 0, 9),
        Variant("methods", "coral", 0, 9),
        own,
        Variant("methods", "eagle2", 1, 9),
    ]
    with ThreadPoolExecutor(1) as pool:
        first = list(Rows(path).measured(bench, wanted[:2], pool))  # type: ignore[arg-type]
        again = list(Rows(path).measured(bench, wanted, pool))  # type: ignore[arg-type]
    assert measured == ["hass", "coral", "eagle2"]
    assert again[:2] == first
    unmeasured = Variant("methods", "hass", 3, 9)
    assert Rows(path).finished(bench, [unmeasured, *wanted]) == wanted  # type: ignore[arg-type]
    assert [(row["part"], row["name"]) for row in again] == [(variant.part, variant.name) for variant in wanted]


def test_a_row_that_was_measured_is_kept_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(variant: Variant) -> methods.Row:
        if variant.preset == "coral":
            raise KeyboardInterrupt
        return {"part": variant.part, "name": variant.name, "seed": variant.seed}

    monkeypatch.setattr(methods, "_measure", measure)
    path = tmp_path / "methods.jsonl"
    wanted = [Variant("methods", "hass", 0, 9), Variant("methods", "coral", 0, 9)]
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        list(Rows(path).measured(FakeBench(), wanted, pool))  # type: ignore[arg-type]
    assert len(Rows(path).done) == 1


def test_a_row_that_was_cut_off_is_measured_again(measured: list[str], tmp_path: Path) -> None:
    bench, path = FakeBench(), tmp_path / "methods.jsonl"
    wanted = [Variant("methods", name, 0, 9) for name in ("hass", "coral", "eagle2")]
    with ThreadPoolExecutor(1) as pool:
        rows = list(Rows(path).measured(bench, wanted[:2], pool))  # type: ignore[arg-type]
        path.write_text(path.read_text()[:-9])
        again = list(Rows(path).measured(bench, wanted, pool))  # type: ignore[arg-type]
    assert measured == ["hass", "coral", "coral", "eagle2"] and again[:2] == rows
    assert Rows(path).finished(bench, wanted) == wanted  # type: ignore[arg-type]


QUICK = Recipe(train=TrainSpec(**UNSET, **PRESETS["quick"]))  # type: ignore[arg-type]
COSTS = {"eagle2 1": 1.0, "hass 1": 1.0, "hass 2": 2.0, "hass 3": 3.0, "coral 1": 1.0, "coral 2": 2.0, "coral 3": 4.0}


def test_equal_time_by_hand() -> None:
    """Of 100 steps of CORAL, growing over 75, 38 take a second, 37 two and 25 four: 212 seconds. HASS takes 1.875 on
    the mean; the last one differs by what a step of EAGLE-2 costs, or half a step of HASS."""
    bench = Bench(QUICK, Path(), None, None, [], [])  # type: ignore[arg-type]
    eagle2, hass, coral = timed(bench, COSTS, 100, seed=3)
    assert (eagle2.steps, hass.steps, coral.steps) == (212, 113, 100)
    assert {variant.name for variant in (eagle2, hass, coral)} == {"eagle2", "hass", "coral"}
    assert {variant.part for variant in (eagle2, hass, coral)} == {"equal time, 100 steps of coral"}
    assert [bench.spec(variant).unroll_growth for variant in (eagle2, hass, coral)] == [0.0, 0.75, 0.75]
    assert {bench.spec(variant).candidates for variant in (eagle2, hass, coral)} == {QUICK.train.candidates}
    assert training_seconds(bench.spec(hass), 3, COSTS) == pytest.approx(212, abs=1.5)


def test_equal_time_counts_the_passes_that_were_drawn() -> None:
    """Of 1,000 steps some 400 take a second, 300 two and 300 four."""
    drawn = Recipe(train=TrainSpec(**{**UNSET, **PRESETS["drawn"], "unroll_growth": 0.0}))  # type: ignore[arg-type]
    bench = Bench(drawn, Path(), None, None, [], [])  # type: ignore[arg-type]
    eagle2, _, coral = timed(bench, COSTS, 1000, seed=3)
    assert bench.spec(coral).unroll_drawn and not bench.spec(eagle2).unroll_drawn
    assert eagle2.steps == pytest.approx(2200, rel=0.05)


def test_where_time_is_equal_coral_has_the_recipes_form_and_the_others_their_own() -> None:
    form = {**PRESETS["coral3"], "shape": "eagle3.1", "unroll_steps": 3}
    bench = Bench(Recipe(train=TrainSpec(**form)), Path(), None, None, [], [])  # type: ignore[arg-type]
    eagle2, hass, coral = (bench.spec(variant) for variant in timed(bench, COSTS, 100, seed=3))
    assert [getattr(coral, key) for key in form] == list(form.values())
    assert [(s.shape, s.through_steps, s.regression_weight) for s in (eagle2, hass)] == [("eagle2", False, 1.0)] * 2
    assert [s.unroll_growth for s in (eagle2, hass, coral)] == [0.0, 0.75, 0.75]
    noisy = dataclasses.replace(bench, noise=0.02)
    assert [noisy.spec(variant).feature_noise for variant in timed(noisy, COSTS, 100, seed=3)] == [0.02, 0.02, 0.0]
    at_equal_steps = bench.spec(Variant("methods", "coral", 3, 100))
    assert (at_equal_steps.shape, at_equal_steps.unroll_growth) == ("eagle2", 0.0)


def test_a_budget_tells_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "step_costs", lambda bench: COSTS)
    bench = Bench(QUICK, Path(), None, None, [], [])  # type: ignore[arg-type]
    part = "equal time, 100 steps of coral"
    numbers = {"part": part, "seed": 0, "tokens": [20, 30], "rounds": [10, 10]}
    found = [
        {**numbers, "name": name, "steps": steps} for name, steps in (("eagle2", 212), ("hass", 113), ("coral", 100))
    ]
    assert methods.figures(bench, found)["equal_time_budgets"]["100 steps of coral"]["seconds"] == 212
    without_hass = methods.figures(bench, [found[0], found[2]])["equal_time"]
    assert without_hass["coral_over_eagle2"] == 1 and "coral_over_hass" not in without_hass
    assert methods.figures(bench, found[:2])["equal_time_budgets"] == {}


def test_three_budgets_make_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 answer tokens in 60 samples, two of them a step: 20 a step. Each doubling brings half a token per round."""
    monkeypatch.setattr(methods, "step_costs", lambda bench: COSTS)
    manifest = Namespace(facts={"answer_tokens": 600, "samples": 60})
    recipe = dataclasses.replace(QUICK, train=dataclasses.replace(QUICK.train, batch_size=2))
    bench = Bench(recipe, Path(), Namespace(manifest=manifest), None, [], [])  # type: ignore[arg-type]
    found = [
        {"part": f"equal time, {steps} steps of coral", "name": "coral", "seed": 0, "steps": steps, **counts}
        for steps, counts in (
            (100, {"tokens": [20], "rounds": [10]}),
            (25, {"tokens": [10], "rounds": [10]}),
            (50, {"tokens": [15], "rounds": [10]}),
        )
    ]
    told = methods.figures(bench, found)
    assert list(told["equal_time_budgets"]) == ["25 steps of coral", "50 steps of coral", "100 steps of coral"]
    assert told["equal_time"] == {}
    drawn = told["coral_curve"]
    assert drawn["tau_by_answer_tokens"] == {"500": 1.0, "1000": 1.5, "2000": 2.0}
    assert drawn["tau_per_doubling"] == pytest.approx(0.5)
    assert drawn["answer_tokens_for_tau_3"] == pytest.approx(8000, abs=1)
    assert "coral_curve" not in methods.figures(bench, found[:2])


def test_a_ratio_takes_the_seeds_that_both_methods_have() -> None:
    """HASS was trained once; the other two keep both of their seeds."""
    tokens = {("eagle2", 0): 20, ("coral", 0): 30, ("hass", 0): 24, ("eagle2", 1): 20, ("coral", 1): 34}
    found = [
        {"part": "methods", "name": name, "seed": seed, "tokens": [count], "rounds": [10]}
        for (name, seed), count in tokens.items()
    ]
    told = methods.compare(found, "methods")
    assert told["tau"] == {"eagle2": 2.0, "hass": 2.4, "coral": 3.2}
    assert (told["coral_over_eagle2"], told["coral_over_hass"], told["hass_over_eagle2"]) == (1.6, 1.25, 1.2)
    assert told["seeds"] == {"eagle2": 2, "hass": 1, "coral": 2}
