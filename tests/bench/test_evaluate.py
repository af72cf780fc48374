"""A whole evaluation on a tiny target: several methods, both kinds of temperature, interruption."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coral_core.artifacts import Manifest
from coral_core.bench.evaluate import Plan, evaluate, interrupted
from coral_core.bench.methods import Method, learnt_elsewhere
from coral_core.bench.questions import Bench, Question
from coral_core.bench.race import PLAIN, Racers, fitting, race
from coral_core.bench.samples import depths
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.errors import DataError
from coral_core.progress import silent
from coral_core.recipe.loader import load_recipe
from tests.tiny import tiny_engine, tiny_target


class Letters:
    """A tokenizer of one letter per id."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(32 + token) for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(32 + token)


def letters(tokenizer: Letters, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a dialogue, without a word on who speaks."""
    return [ord(letter) - 32 for message in messages for letter in message["content"]]


TARGET = dataclasses.replace(tiny_target(), tokenizer=Letters())
QUESTIONS = [Question(f"q{n}", ids=(5 + n, 6, 7)) for n in range(3)]


def method(name: str, depth: int) -> Method:
    engine = tiny_engine(TARGET, depth=depth, nodes=4, topk=2)
    facts = {
        "method": name,
        "drafter": {"run": name, "preset": None, "fingerprint": name},
        "head": {"kind": "full"},
        "tree": dataclasses.asdict(engine.shape),
    }
    return Method(name, engine, Path(name), facts)


def plan(temperature: float = 0.0, seed: int = 0) -> Plan:
    keys = ["name=tiny", "decode.max_new_tokens=10", f"decode.temperature={temperature}", f"seed={seed}"]
    recipe = load_recipe(None, keys)
    return Plan(
        recipe=recipe,
        target=TARGET,
        methods=[method("shallow full", 2), method("deep full", 4)],
        benches=[Bench("mine", QUESTIONS)],
    )


class StopHereError(Exception):
    pass


def interrupt(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    if done == 2:
        raise StopHereError


class Wrong(Engine):
    """Says another token than the target in its second place."""

    def decode(self, *given: Any) -> Iterator[Round]:
        for number, event in enumerate(super().decode(*given)):
            first, *rest = event.new_ids
            yield dataclasses.replace(event, new_ids=[(first + (number == 1)) % 96, *rest])


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_core.bench.distribution.SEEDS", 8)


def numbers_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [numbers for one in (results, *results["others"]) for numbers in one["benches"].values()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_methods_in_one_run(tmp_path: Path, temperature: float) -> None:
    results = evaluate(plan(temperature), tmp_path, silent)
    assert list(results["benches"]) == ["mine"]
    assert [other["method"] for other in results["others"]] == ["deep full"]
    found = numbers_of(results)
    assert [numbers["temperature"] for numbers in found] == [temperature] * 2
    for numbers in found:
        assert numbers["lossless"] == {"checked": 3, "equal": 3, "ties": 0, "first_divergence": None}
        assert numbers["rows_read"] == 96
        assert (numbers["distribution"] is None) == (numbers["temperature"] == 0)
        raced = numbers["plain_decoders"]
        own, generate = {"plain float32", "plain float32 inexact", "plain bfloat16 inexact"}, {"generate float32"}
        assert set(raced) == own | generate | {"generate bfloat16"}
        assert raced[numbers["baseline"]] == max(raced.values()) == numbers["baseline_tokens_per_s"]
    for row in (tmp_path / "eval" / "mine.jsonl").read_text().splitlines():
        assert len(json.loads(row)[0]["lanes"]) == 2 + 5, "every plain decoder on every question"
    assert json.loads((tmp_path / "eval" / "results.json").read_text()) == results
    for name in ("results.md", "results.tex", "report.html", "mine.jsonl", "manifest.json"):
        assert (tmp_path / "eval" / name).stat().st_size > 100
    assert "deep full" in (tmp_path / "eval" / "report.html").read_text()


def test_a_wrong_token_is_told_with_its_place(tmp_path: Path) -> None:
    right = method("shallow full", 2)
    wrong = Wrong(right.engine.target, right.engine.drafter, right.engine.head, right.engine.shape)
    results = evaluate(
        dataclasses.replace(plan(), methods=[dataclasses.replace(right, engine=wrong)]), tmp_path, silent
    )
    (numbers,) = numbers_of(results)
    lossless = numbers["lossless"]
    assert (lossless["checked"], lossless["equal"], lossless["ties"]) == (3, 0, 0)
    assert (lossless["first_divergence"]["question"], lossless["first_divergence"]["position"]) == ("q0", 1)


def test_no_code_of_an_answer_is_run_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr("coral_core.bench.grade.runs_through", lambda program: (ran.append(program), True)[1])
    monkeypatch.setattr("coral_core.bench.race.prompt_ids", letters)
    question = Question("q", turns=("def f():",), tests="assert f() == 1", entry_point="f")
    for run_code in (False, True):
        asked = dataclasses.replace(plan(), benches=[Bench("code", [question])], run_code=run_code)
        (numbers, _) = numbers_of(evaluate(asked, tmp_path, silent))
        assert bool(ran) == run_code == (numbers["answers"] is not None)


def test_both_turns_of_a_question_are_raced_behind_the_plain_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []

    def noted(tokenizer: Letters, messages: list[dict[str, str]]) -> list[int]:
        asked.append(list(messages))
        return letters(tokenizer, messages)

    monkeypatch.setattr("coral_core.bench.race.prompt_ids", noted)
    right = method("shallow full", 2).engine
    racers = Racers(TARGET, {"wrong": Wrong(right.target, right.drafter, right.head, right.shape)}, Sampler(), 4)
    ((first, second),) = race(racers, [Question("talk", turns=("one", "two"))])
    said = [token for event in plain(TARGET, [79, 78, 69], Sampler(), 4) for token in event.new_ids]
    assert first.lanes[PLAIN].ids == said != first.lanes["wrong"].ids
    answer = {"role": "assistant", "content": Letters().decode(said)}
    assert asked[-1] == [{"role": "user", "content": "one"}, answer, {"role": "user", "content": "two"}]
    assert (first.turn, second.turn, second.prompt_tokens) == (0, 1, 6 + len(said))


def test_held_out_prompts_of_other_data_are_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Manifest(kind="data", fingerprint="new", inputs={}, recipe={}, facts={}).sealed(data).write(data)
    for learnt, told in (("new", ""), (None, ""), ("old", "shallow full was trained on other data than")):
        facts = {"drafter": {"data": learnt}}
        found = learnt_elsewhere(dataclasses.replace(method("shallow full", 2), facts=facts), tmp_path)
        assert found[:42] == told[:42] and bool(found) == bool(told)


def test_two_runs_have_the_same_tau_and_another_seed_other_answers(tmp_path: Path) -> None:
    answers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(plan(1.0, seed), tmp_path / name, silent)
        rows = (tmp_path / name / "eval" / "mine.jsonl").read_text().splitlines()
        lanes = [json.loads(row)[0]["lanes"]["deep full"] for row in rows]
        answers.append([(lane["ids"], lane["emitted"]) for lane in lanes])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        evaluate(plan(), tmp_path, interrupt)
    (rows,) = tmp_path.glob(".eval-*.partial/mine.jsonl")
    kept = rows.read_text()
    assert len(kept.splitlines()) == 2
    rows.write_text(kept + '[{"question": "q2", "tu')  # killed in the middle of a line
    assert interrupted(plan(), tmp_path) == f"goes on with the interrupted evaluation in {tmp_path}"
    seen: list[int] = []
    results = evaluate(plan(), tmp_path, lambda stage, done, total, numbers: seen.append(done))
    assert seen == [2, 3], "the two finished questions are not raced again"
    assert (tmp_path / "eval" / "mine.jsonl").read_text().startswith(kept)
    assert [numbers["questions"] for numbers in numbers_of(results)] == [3, 3]


@pytest.mark.parametrize("damage", ["\x00\n", "null\n", "[{}]\n", '[{"question": "q\n'])
def test_a_damaged_row_is_raced_again(tmp_path: Path, damage: str) -> None:
    with pytest.raises(StopHereError):
        evaluate(plan(), tmp_path, interrupt)
    (rows,) = tmp_path.glob(".eval-*.partial/mine.jsonl")
    first, _ = rows.read_text().splitlines(keepends=True)
    rows.write_text(first + damage)
    seen: list[int] = []
    evaluate(plan(), tmp_path, lambda stage, done, total, numbers: seen.append(done))
    assert seen == [1, 2, 3]
    assert (tmp_path / "eval" / "mine.jsonl").read_text().startswith(first)


def test_an_interrupted_evaluation_stays_when_something_else_is_evaluated(tmp_path: Path) -> None:
    """`coral eval --limit 1` after an hour of `coral eval` began that hour anew."""
    assert interrupted(plan(), tmp_path) == ""
    with pytest.raises(StopHereError):
        evaluate(plan(), tmp_path, interrupt)
    other = plan(1.0, seed=5)
    assert interrupted(other, tmp_path) == ""
    seen: list[int] = []
    for asked in (other, plan()):
        evaluate(asked, tmp_path, lambda stage, done, total, numbers: seen.append(done))
    assert seen == [0, 1, 2, 3, 2, 3]
    assert not list(tmp_path.glob(".eval*"))


def test_lanes_take_turns_in_going_first() -> None:
    """Three lanes, three questions: each is first once; every lane warmed up before."""
    order: list[str] = []
    racers = Racers(TARGET, {one.name: one.engine for one in plan().methods}, Sampler(), 4)
    lanes = racers.lanes()

    class Spied(Racers):
        def lanes(self):  # type: ignore[no-untyped-def]
            return {name: lambda prompt, name=name: (order.append(name), lanes[name](prompt))[1] for name in lanes}

    spied = Spied(TARGET, racers.engines, racers.sampler, racers.max_new_tokens)
    raced = list(race(spied, QUESTIONS))
    a, b, c = PLAIN, "shallow full", "deep full"
    assert order == [a, b, c, *(a, b, c), *(b, c, a), *(c, a, b)]
    assert [list(turns[0].lanes) for turns in raced] == [[a, b, c]] * 3


def test_a_question_beyond_the_context_is_counted(tmp_path: Path) -> None:
    long = Question("long", ids=(5,) * TARGET.max_positions)
    results = evaluate(dataclasses.replace(plan(), benches=[Bench("mine", [long, *QUESTIONS])]), tmp_path, silent)
    (numbers, _) = numbers_of(results)
    assert (numbers["questions"], numbers["turns_too_long"]) == (3, 1)
    assert "1 turns do not fit the target's context" in (tmp_path / "eval" / "results.md").read_text()
    with pytest.raises(DataError, match="no question fits the target's context of 160 tokens .the shortest has 160"):
        fitting(TARGET, [long])


def test_where_every_token_came_from() -> None:
    """The prefill's own; a round of two accepted and the bonus; one of none; one that the answer's end cut."""
    from coral_core.bench.race import Lane

    lane = Lane([1, 2, 3, 4, 5, 6, 7], 0, 0, [2, 0, 2], [3, 1, 2], {})
    assert depths(lane) == [0, 1, 2, 0, 0, 1, 2]
