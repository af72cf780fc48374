"""What a round costs on a device: measured once, kept in the run, and not believed where the machine wavers."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from coral_core.decoding import measure
from coral_core.decoding.engine import Engine
from coral_core.decoding.measure import measure_costs, tuned
from coral_core.decoding.policy.costs import Costs, rising
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.target.load import wrap
from tests.decoding.policy.test_adaptive import PLAIN_CPU
from tests.decoding.test_lossless import ids_of
from tests.tiny import SHAPE, tiny_engine, tiny_target


def read(run: Path) -> str:
    return (run / measure.FILE).read_text(encoding="utf-8")


def test_costs_between_and_beyond_the_measured_rows() -> None:
    measured = Costs(step_s=1, verify={1: 1.0, 2: 1.2, 4: 1.4}, level={1: 0.1, 4: 0.4}, base=0.1)
    assert measured.verified(6) == pytest.approx([1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
    assert measured.expanded(5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert rising([1.0, 1.4, 1.2, 2.0]) == pytest.approx([1.0, 1.3, 1.3, 2.0])
    assert rising([3.0, 2.0, 1.0]) == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed"])
def test_measuring_leaves_nothing_behind(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "REPEATS", (1, 1))
    engine = tiny_engine(tiny_target(family))
    before = ids_of(list(engine.decode([5, 6, 7], Sampler(), 12)))
    found = measure_costs(engine)
    assert set(found.verify) == set(measure.ROWS) and set(found.level) == set(measure.WIDTHS)
    assert found.verify[1] == 1.0 and list(found.verify.values()) == sorted(found.verify.values())
    assert Costs.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert ids_of(list(dataclasses.replace(engine, costs=found).decode([5, 6, 7], Sampler(), 12))) == before


def test_costs_are_kept_in_the_run_and_measured_again_for_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(engine: Engine) -> Costs:
        calls.append(len(calls))
        return dataclasses.replace(PLAIN_CPU, base=0.1 + len(calls))

    monkeypatch.setattr(measure, "measure_costs", measured)
    monkeypatch.setattr(measure, "step_s", lambda engine: PLAIN_CPU.step_s)
    engine, of = tiny_engine(tiny_target()), {"target": "t", "drafter": "d", "head": "h"}
    first = tuned(engine, tmp_path, of)
    assert tuned(engine, tmp_path, of).costs == first.costs and calls == [0]
    for key in of:
        assert tuned(engine, tmp_path, {**of, key: "another"}).costs != first.costs
    assert calls == [0, 1, 2, 3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    tuned(engine, tmp_path, of)
    assert len(calls) == 5, "another number of threads"
    monkeypatch.undo()
    monkeypatch.setattr(measure, "measure_costs", measured)
    monkeypatch.setattr(measure, "step_s", lambda engine: PLAIN_CPU.step_s)
    assert tuned(engine, tmp_path, of).costs == first.costs, "the others did not push it out"
    for damage in ("{", "[]", json.dumps({name: {"costs": {}} for name in json.loads(read(tmp_path))})):
        (tmp_path / measure.FILE).write_text(damage)
        count = len(calls)
        assert tuned(engine, tmp_path, of).costs is not None and len(calls) == count + 1
        assert tuned(engine, tmp_path, of).costs is not None and len(calls) == count + 1, "mended"


def test_costs_of_a_busy_hour_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a fifth of what it took then; the other way round, it is this hour that is busy."""
    engine = tiny_engine(tiny_target())
    now_s = measure.step_s(engine)
    assert 0 < now_s < 1
    for slower, times in ((5, 2), (0.2, 1)):
        calls = []

        def measured(engine: Engine, slower: float = slower, calls: list[int] = calls) -> Costs:
            calls.append(1)
            return dataclasses.replace(PLAIN_CPU, step_s=slower * 0.01)

        monkeypatch.setattr(measure, "measure_costs", measured)
        monkeypatch.setattr(measure, "step_s", lambda engine: 0.01)
        of = {"target": str(slower)}
        tuned(engine, tmp_path, of)
        tuned(engine, tmp_path, of)
        assert len(calls) == times


def test_a_machine_that_wavers_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = tiny_engine(tiny_target()), itertools.count()
    monkeypatch.setattr(measure, "REPEATS", (4, 4))

    def wavering(device: torch.device) -> float:
        """Every part takes 1, 1, 3 and 3 seconds by turns."""
        call = next(clock)
        turn = call // 2 // 12
        return call * 100.0 + (call % 2) * (-99.0 if turn % 4 < 2 else -97.0)

    monkeypatch.setattr(measure, "_now", wavering)
    costs = tuned(engine, tmp_path, {}).costs
    assert costs == measure.typical(engine, 1.0)
    assert costs.level[1] > measure.OVERHEAD + 0.3, "drafter and head are a third of a model of two layers and more"
    monkeypatch.setattr(measure, "measure_costs", lambda engine: pytest.fail("measured again"))
    monkeypatch.setattr(measure, "step_s", lambda engine: 0.5)
    assert tuned(engine, tmp_path, {}).costs == costs, "the next evaluation has the same trees"


def test_typical_costs_count_the_experts_of_a_token_alone() -> None:
    """A mixture of four experts whose router takes two has the level of one with two, and not of its own size."""
    levels = []
    for experts in (2, 4):
        mixture = {"num_experts_per_tok": 2, "num_local_experts": experts}
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**SHAPE, **mixture))
        engine = tiny_engine(wrap(model, None))
        levels.append(measure.typical(engine, 1.0).level[1])
    assert levels[1] == pytest.approx(levels[0], rel=0.01), "but for the router"


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_costs", lambda engine: PLAIN_CPU)
    assert tuned(tiny_engine(tiny_target()), tmp_path / "no", {}).costs == PLAIN_CPU
    assert not (tmp_path / "no").exists()


def steady(turn: int, drafts: bool) -> float:
    return 5.0 if drafts else 1.0


def slow_for_a_while(turn: int, drafts: bool) -> float:
    return steady(turn, drafts) * (3.0 if turn < 6 else 1.0)


def one_quick_step(turn: int, drafts: bool) -> float:
    return 0.4 if turn == 9 and not drafts else steady(turn, drafts)


def one_quick_round(turn: int, drafts: bool) -> float:
    return 2.0 if turn == 9 and drafts else steady(turn, drafts)


@pytest.mark.parametrize("seconds", [steady, slow_for_a_while, one_quick_step, one_quick_round])
def test_what_a_round_takes_outside_of_its_parts_is_a_cost(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, bool], float]
) -> None:
    """The same parts, and rounds that take 5 plain steps by the clock: the base makes up for the difference."""
    engine, now = tiny_engine(tiny_target()), [0.0]
    decode = Engine.decode

    def timed(engine: Engine, *args: Any) -> Iterator[Round]:  # plain decoding is an engine without a drafter
        for turn, event in enumerate(decode(engine, *args)):
            now[0] += seconds(turn, engine.drafter is not None)
            yield event

    monkeypatch.setattr(Engine, "decode", timed)
    monkeypatch.setattr(measure, "_now", lambda device: now[0])
    costs = measure._whole(engine, PLAIN_CPU)
    shape = measure.ROUND
    paid = costs.base + (shape.depth - 1) * costs.expanded(shape.topk)[-1] + costs.verified(shape.nodes)[-1]
    assert paid == pytest.approx(5.0, abs=1e-3)
    assert dataclasses.replace(costs, base=PLAIN_CPU.base) == PLAIN_CPU


def test_costs_of_exact_forwards_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(measure, "step_s", lambda engine: PLAIN_CPU.step_s)
    monkeypatch.setattr(measure, "measure_costs", lambda engine: calls.append(engine.target.exact) or PLAIN_CPU)
    target = tiny_target()
    for exact in (True, False, True, False):
        tuned(tiny_engine(dataclasses.replace(target, exact=exact)), tmp_path, {})
    assert calls == [True, False], "each is measured once"
