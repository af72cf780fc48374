"""The table of real models: its figures from rows by hand, and rows that are not computed twice."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import llamacpp, real, real_figures, real_rounds, record
from coral_core.bench.race import Lane, run_lane
from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.sampling import Sampler
from coral_core.head.heads import FullHead
from tests.tiny import tiny_drafter, tiny_target

SMOLLM2 = {"model": "smollm2", "results": "real"}


def lane(tokens: int, rounds: int, decode_s: float, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens + 1, "rounds": rounds, "plain_rounds": 0, "prefill_s": 1.0, "decode_s": decode_s, **more}


def row(bench: str, question: str, temperature: float = 0.0, right: bool = True) -> dict[str, Any]:
    """Of the race: CORAL's grouped head is faster than its full one."""
    lanes = {
        "plain float32": lane(60, 60, 6.0),
        "generate bfloat16": lane(60, 60, 5.0),
        "coral full auto float32": lane(60, 20, 3.0, equal=right),
        "coral grouped auto float32": lane(60, 30, 2.0, equal=True),
        "lookup float32": lane(60, 30, 4.0),
        "llamacpp q4": lane(60, 60, 1.0),
        "llamacpp q4 ngram": lane(60, 60, 0.5),
        "llamacpp bf16": lane(60, 60, 4.0),
        "plain bfloat16": lane(60, 60, 8.0),
    }
    return {**named(bench, question, temperature), "settings": "s", "prompt_tokens": 3, "lanes": lanes}


def counted(bench: str, question: str, temperature: float = 0.0) -> list[dict[str, Any]]:
    """CORAL drafts 4 tokens a round with the full head and 3 with the grouped one; HASS and its other seed 3 and 5."""
    found = [("coral", "full", 15), ("coral", "grouped", 20), ("hass", "full", 20), ("hass@1", "full", 12)]
    name = named(bench, question, temperature) | {"settings": "s", "tokens": 60, "alike": True}
    return [{**name, "method": method, "head": head, "rounds": rounds} for method, head, rounds in found]


def named(bench: str, question: str, temperature: float) -> dict[str, Any]:
    return {"model": "smollm2", "bench": bench, "question": question, "temperature": temperature}


def test_figures_by_hand() -> None:
    asked = [("mt-bench", "a", 0.0), ("mt-bench", "b", 0.0), ("gsm8k", "c", 0.0), ("gsm8k", "c", 1.0)]
    raced = [row(*one, right=one[2] == 0) for one in asked]
    found = real_figures.figures([*raced, *(count for one in asked[1:] for count in counted(*one))])
    assert found["questions"] == {"counted": {"T = 0": 2, "T = 1": 1}, "raced": {"T = 0": 3, "T = 1": 1}}
    assert found["tau"] == {"coral": 4.0, "hass": pytest.approx(120 / 32)}
    assert found["speedup_greedy"] == pytest.approx(5.0 / 2.0), "the fastest of ours over the fastest plain lane"
    assert found["lookup_speedup_greedy"] == pytest.approx(5.0 / 4.0)
    assert found["coral_over_hass"] == pytest.approx(4.0 / 3.0), "of the seed that both have"
    assert found["grouped_tau_kept"] == pytest.approx(0.75)
    assert found["grouped_gain"] == pytest.approx(1.5)
    assert found["lossless_share"] == pytest.approx(7 / 8), "at both temperatures"
    llama = found["llamacpp"]
    assert llama["q4_tokens_per_s"] == pytest.approx(60.0) and llama["q4_ngram_tokens_per_s"] == pytest.approx(120.0)
    assert llama["plain_over_llamacpp_same_bits"] == pytest.approx(0.5)


def test_methods_of_equal_steps_are_compared_apart() -> None:
    """They have questions of their own: one that equal time lacks still counts."""
    steps = [{**one, "method": one["method"].replace("hass", "hass-steps")} for one in counted("gsm8k", "b")[2:]]
    steps += [{**one, "method": f"coral-steps{seed}"} for one in counted("gsm8k", "b")[:1] for seed in ("", "@1")]
    found = real_figures.figures([*counted("gsm8k", "a"), *steps])
    assert found["tau"] == {"coral": 4.0, "coral-steps": 4.0, "hass": 3.75, "hass-steps": 3.75}
    assert found["coral_over_hass"] == pytest.approx(4 / 3), "the seed that both have"
    assert found["equal_steps"]["coral_over_hass"] == pytest.approx(32 / 30), "both seeds"
    sampled = [{**one, "temperature": 1.0} for one in steps]
    assert real_figures.figures(sampled)["equal_steps_sampled"] == found["equal_steps"]
    assert found["questions"]["counted, steps"] == {"T = 0": 1} and "equal_steps" not in real_figures.figures(
        counted("gsm8k", "a")
    )


def test_rows_without_a_race_have_no_speeds() -> None:
    found = real_figures.figures(counted("gsm8k", "a"))
    assert found["tau"]["coral"] == 4.0 and found["lossless_share"] is None and "speedup_greedy" not in found


def test_speed_and_heads_are_told_of_the_drafter_that_ships() -> None:
    raced = row("gsm8k", "a")
    raced["lanes"] |= {
        f"coral-long {head} auto float32": lane(60, 20, seconds, equal=True)
        for head, seconds in (("full", 1.5), ("grouped", 1.0))
    }
    longer = [{**one, "method": "coral-long", "rounds": one["rounds"] - 5} for one in counted("gsm8k", "a")[:2]]
    found = real_figures.figures([raced, *counted("gsm8k", "a"), *longer])
    assert found["tau"] == {"coral": 4.0, "coral-long": 6.0, "hass": 3.75}
    assert (found["speedup_greedy"], found["grouped_gain"]) == (pytest.approx(5.0), pytest.approx(1.5))
    assert found["grouped_tau_kept"] == pytest.approx(4 / 6)
    assert found["coral_over_hass"] == pytest.approx(4 / 3), "at equal data: not the long one"


def test_a_method_is_told_of_the_benches_that_it_has() -> None:
    longer = [{**one, "method": "coral-long", "rounds": 10} for one in counted("gsm8k", "a")[:1]]
    found = real_figures.figures([*counted("gsm8k", "a"), *counted("humaneval", "b"), *longer])
    assert found["tau"] == {"coral": 4.0, "coral-long": 6.0, "hass": 3.75}


def test_a_question_that_not_all_methods_have_counts_for_none() -> None:
    late = [{**one, "rounds": 1} for one in counted("gsm8k", "b")[:3]]
    found = real_figures.figures([*counted("gsm8k", "a"), *late])
    assert found["questions"]["counted"] == {"T = 0": 1} and found["tau"]["coral"] == 4.0


def test_a_race_of_its_own_and_other_questions_are_told_of_the_drafter_that_ships() -> None:
    """The methods' race and counts stay as they are, although it did not run in that race and has other questions."""
    later = {**row("gsm8k", "b"), "settings": "later"}
    later["lanes"] = {"plain float32": lane(60, 60, 6.0), "coral-long full auto float32": lane(60, 20, 2.0, equal=True)}
    longer = [{**one, "method": "coral-long", "rounds": 10} for one in counted("gsm8k", "b")[:1]]
    before = {**later, "settings": "before", "lanes": {**later["lanes"], "plain float32": lane(60, 60, 9.0)}}
    found = real_figures.figures([row("gsm8k", "a"), before, later, *counted("gsm8k", "a"), *longer])
    assert found["tau"] == {"coral": 4.0, "coral-long": 6.0, "hass": 3.75}
    assert found["questions"]["counted"] == found["questions"]["counted, long"] == {"T = 0": 1}
    assert found["questions"]["raced"] == {"T = 0": 2} and found["speedup_greedy"] == pytest.approx(3.0), "the last"


def test_speeds_are_those_of_the_drafter_that_was_counted() -> None:
    """Two drafters of one name were raced: not the last race counts, but that of the drafter whose rounds are told."""
    own, other = ({"coral": [name, f"head of {name}"]} for name in "ab")
    first, later = row("gsm8k", "a") | {"drafters": own}, row("gsm8k", "a") | {"settings": "later", "drafters": other}
    later["lanes"] = {**later["lanes"], "plain float32": lane(60, 60, 1.0)}
    rounds = [{**one, "made": own["coral"][: 1 + (one["head"] == "grouped")]} for one in counted("gsm8k", "a")[:2]]
    assert real_figures.figures([first, later, *rounds])["speedup_greedy"] == pytest.approx(2.5)
    assert "speedup_greedy" not in real_figures.figures([later, *rounds]), "a race of another drafter alone"
    untold = {name: value for name, value in first.items() if name != "drafters"}
    assert real_figures.figures([later, untold, later, *rounds])["speedup_greedy"] == pytest.approx(2.5)
    assert real_figures.figures([first, later, *counted("gsm8k", "a")])["speedup_greedy"] == pytest.approx(0.5)


def test_methods_without_a_common_seed_are_not_compared() -> None:
    other = [{**one, "method": f"{one['method'].partition('@')[0]}@2"} for one in counted("gsm8k", "a")[:1]]
    assert "coral_over_hass" not in real_figures.figures([*counted("gsm8k", "a")[2:], *other])


def test_what_was_not_measured_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (real, record):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["real.py", "smollm2"])
    raced, other = row("gsm8k", "a"), {**row("gsm8k", "a"), "model": "qwen"}
    options = argparse.Namespace(model="qwen", results="real", limit=1, temperatures=[0.0, 1.0])
    real.write(options, [other])
    real.write(argparse.Namespace(model="smollm2", results="another", limit=1, temperatures=[0.0]), [raced])
    assert "smollm2" not in json.loads((tmp_path / "real.json").read_text())["figures"]
    real.write(argparse.Namespace(**SMOLLM2, limit=1, temperatures=[0.0]), [raced, *counted("gsm8k", "a")])
    real.write(argparse.Namespace(**SMOLLM2, limit=0, temperatures=[0.0]), counted("gsm8k", "b"))
    kept = json.loads((tmp_path / "real.json").read_text())
    assert kept["rows"] == [other, raced, *counted("gsm8k", "b")], "counting alone leaves the race as it was"
    again = {**row("gsm8k", "b"), "settings": "other drafters"}
    real.write(argparse.Namespace(**SMOLLM2, limit=1, temperatures=[0.0]), [again])
    kept = json.loads((tmp_path / "real.json").read_text())
    assert kept["rows"] == [other, raced, *counted("gsm8k", "b"), again], "a race of other drafters too"
    eagle2 = [{**one, "method": "eagle2"} for one in counted("gsm8k", "b", temperature=1.0)[:1]]
    real.write(argparse.Namespace(**SMOLLM2, limit=0, temperatures=[1.0]), eagle2)
    kept = json.loads((tmp_path / "real.json").read_text())
    assert kept["rows"] == [other, raced, *counted("gsm8k", "b"), again, *eagle2], "and another method, or temperature"
    assert kept["figures"]["smollm2"]["speedup_greedy"] == pytest.approx(2.5)
    assert kept["figures"]["llamacpp"] == kept["figures"]["smollm2"]["llamacpp"], "of the last race"
    assert kept["figures"]["qwen"]["llamacpp"]["q4_tokens_per_s"] == pytest.approx(60.0), "each model's own too"
    assert set(kept["parts"]) == {
        "qwen, race of coral, T = 0 and 1",
        "smollm2, race of coral and rounds of coral, hass, hass@1, T = 0",
        "smollm2, rounds of coral, hass, hass@1, T = 0",
        "smollm2, race of coral, T = 0",
        "smollm2, rounds of eagle2, T = 1",
    }


def test_only_the_fastest_of_lanes_that_do_the_same_goes_on() -> None:
    """The plain loop in float32 stays, slow as it is: drafted answers in float32 are compared with it."""
    assert real.ahead([row("gsm8k", "a")]) == set(row("gsm8k", "a")["lanes"]) - {"plain bfloat16"}
    slow = row("gsm8k", "b")
    slow["lanes"] |= {"coral full auto bfloat16": lane(60, 20, 9.0, equal=True), "lookup bfloat16": lane(60, 30, 1.0)}
    assert real.ahead([slow]) == set(slow["lanes"]) - {"plain bfloat16", "coral full auto bfloat16", "lookup float32"}
    figures = real_figures.figures([slow, row("gsm8k", "a")])
    assert figures["lookup_speedup_greedy"] == pytest.approx(5.0 / 4.0), "of the lanes that answered both questions"


SHAPE = TreeShape(depth=3, nodes=6, topk=2)


class Untrained(real_rounds.Drafted):
    """A drafter of random weights: most of its drafts are refused."""

    made_engines = 0

    def made(self, head: str) -> list[str]:
        return [self.name, head]

    def engine(self, target: Any, head: str, tree: str) -> Engine:
        Untrained.made_engines += 1
        assert tree == "fixed"
        torch.manual_seed(len(self.name))
        taps = {"coral": (), "coral@1": (0, 2, 3), "hass": (1, 2, 3)}[self.name]
        return Engine(target, tiny_drafter(target, taps=taps), FullHead(target.lent), SHAPE)


def test_rounds_are_those_of_real_decoding_and_counted_once(tmp_path: Path) -> None:
    target, path = tiny_target("llama", layers=4), tmp_path / "rows.jsonl"
    asked = [real_rounds.Asked("gsm8k", "a", temperature, [1, 5, 9, 4]) for temperature in (0.0, 1.0)]
    methods = [Untrained(name, tmp_path) for name in ("coral", "coral@1", "hass")]
    rows = real_rounds.rounds(target, methods[:1], asked, 20, 3, path)
    for one, counted in zip(asked, rows, strict=True):
        engine = methods[0].engine(target, "full", "fixed")
        lane = run_lane(engine.decode(one.prompt, Sampler(temperature=one.temperature, seed=3), 20))
        assert (counted["tokens"], counted["rounds"]) == (len(lane.ids) - 1, len(lane.emitted))
        assert counted["alike"] and counted["temperature"] == one.temperature
    both = real_rounds.rounds(target, methods, asked, 20, 3, path)
    assert [row for row in both if row["method"] == "coral"] == rows
    warm = real_rounds.rounds(target, methods, asked[1:], 20, 3, path)
    assert warm == both, "the other temperature's rows stay"
    halves: Any = SimpleNamespace(fingerprint=target.fingerprint, dtype=torch.bfloat16)
    assert real_rounds.rounds(target, methods, [], 20, 3, path) == both
    assert real_rounds.rounds(halves, methods, [], 20, 3, path) == [], "counted in another dtype"
    assert {row["method"]: row["made"] for row in both} == {one.name: one.made("full") for one in methods}
    made = Untrained.made_engines
    assert real_rounds.rounds(target, methods, asked, 20, 3, path) == both
    assert (Untrained.made_engines, len(path.read_text().splitlines())) == (made, 6), "nothing is made for no row"
    assert real_rounds.rounds(target, methods, asked, 21, 3, path) != both, "longer answers are other rows"


def test_a_race_tells_its_drafters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rows that were there already too: their settings are of the same drafters."""
    monkeypatch.setattr(real, "asked", lambda *_: [real_rounds.Asked("gsm8k", "a", 0.0, [1, 2])])
    monkeypatch.setattr(real, "llama_lanes", lambda *_: [])
    answers = [Lane([1, 2], 0.5, 1.0, [0], [1], {})]
    monkeypatch.setattr(real, "lanes", lambda _: [("plain float32", lambda *_: answers[0])])
    drafter = Untrained("coral", tmp_path)
    options = argparse.Namespace(limit=1, drafters=[drafter], tokens=8, heat=1, benches=["gsm8k"])
    options.rows = tmp_path / "rows.jsonl"
    target: Any = SimpleNamespace(fingerprint="t", tokenizer=None)
    rows = real.race(options, target)
    assert [one["drafters"] for one in rows] == [{"coral": ["coral", "full"]}]
    answers.clear()
    assert real.race(options, target) == rows, "read from the file"


def test_a_row_tells_of_what_came_after_the_prefill() -> None:
    """Prompt lookup's first round may write several tokens, all before its clock starts; llama.cpp tells no ids, and
    `generate` no rounds."""
    lanes = {
        "plain float32": Lane([1, 2, 3, 4, 5, 6], 0.5, 1.0, [0] * 5, [1] * 5, {}),
        "lookup float32": Lane([1, 2, 3, 4, 5, 6], 0.5, 1.0, [2], [3], {}),
        "llamacpp q4": Lane([], 0.5, 1.0, [], [1] * 5, {}),
        "generate float32": Lane([1, 2, 3, 4, 5, 6], 0.5, 1.0, [], [], {}),
    }
    found = real.turn({name: lambda prompt, _, lane=lane: lane for name, lane in lanes.items()}, [7], 0.0, 1)
    assert {name: row["tokens"] for name, row in found.items()} == {
        "plain float32": 6,
        "lookup float32": 4,
        "llamacpp q4": 6,
        "generate float32": 6,
    }
    assert real_figures.speed([{"lanes": found}], "lookup float32") == 3.0


def test_llamacpps_clock_starts_behind_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"predicted_n": 9, "predicted_ms": 2000.0, "prompt_ms": 500.0, "predicted_per_second": 4.5}

    class Server:
        def handle_completions(self, wanted: dict[str, Any], take: Any = None) -> dict[str, Any] | None:
            return take({"choices": [{"text": "a"}], "timings": spent}) if take else {"timings": spent}

    monkeypatch.setattr(llamacpp, "_own", [Server()])
    lane = llamacpp._decode("a", 9, 0.0)
    assert sum(lane.emitted) / lane.decode_s == llamacpp._answer([1], 9).tokens_per_s == 4.0


def test_a_drafter_is_named_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "drafter").mkdir()
    assert real.drafted(f"coral@1={tmp_path}").name == "coral@1"
    for wrong in ("coral", f"coral={tmp_path / 'drafter'}"):
        with pytest.raises(argparse.ArgumentTypeError, match="holds no drafter; give NAME=RUN"):
            real.drafted(wrong)
