"""The decoding benchmark on tiny targets: its lanes say what plain says, its oracle is as right as it claims."""

import argparse
import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch

from benchmarks import decode, decode_cost, decode_gpu, decode_oracle, decode_race
from benchmarks.decode_steps import Machine, Parts, level_work, target_work
from coral_core.bench.methods import Method
from coral_core.bench.race import Lane
from coral_core.decoding import recorded as recording
from coral_core.decoding.policy.plan import TreeShape
from coral_core.head.heads import FullHead
from coral_core.kernels import attention
from coral_core.target.target import Target
from tests.decoding import tape
from tests.tiny import VOCAB, tiny_drafter, tiny_engine, tiny_target


def unstopped() -> Target:
    return dataclasses.replace(tiny_target("llama"), stop_ids=frozenset())


def prompts(count: int) -> list[list[int]]:
    return [random.Random(seed).choices(range(3, VOCAB), k=8) for seed in range(count)]


def test_every_lane_says_what_plain_says() -> None:
    target = tiny_target("llama")
    method = Method("coral full", tiny_engine(target), Path(), {"method": "run full", "tree": {"depth": 4}})
    racers = list(decode_race.entries(target, {"coral full": method}, 24, 1))
    assert [racer.facts["method"] for racer in racers] == [
        "plain",
        "generate",
        "generate, untouched model",
        "prompt lookup",
        "assisted",
        "coral full",
    ]
    rows = decode_race.race(racers, prompts(3), lambda done: None)
    assert [(row["answers"], row["equal"]) for row in rows] == [(3, 3)] * 6
    by_kind = {row["method"]: row for row in rows}
    assert by_kind["plain"]["tau"] == by_kind["generate"]["tau"] == 1.0
    assert {"draft", "head", "verify", "accept", "other"} == set(by_kind["coral full"]["ms_by_phase"])
    assert by_kind["assisted"]["draft_model"] == "the target's first 1 layers, untrained as a model"
    found = decode.figures(rows)
    assert found["float32_answers_equal"]
    assert found["speedup_over_best_plain"] == by_kind["coral full"]["over_best_plain"]
    assert found["plain_over_generate"] == by_kind["plain"]["tokens_per_s"] / by_kind["generate"]["tokens_per_s"]
    assert found["other_share"] == by_kind["coral full"]["other_share"]


def test_the_compiled_lane_says_what_plain_says_and_is_no_baseline() -> None:
    """Captured, and run by Python: whether inductor is right is not tested here."""
    target = unstopped()
    racers = list(decode_race.entries(target, {}, 12, 0))
    racers.append(decode_race.compiled_entry(target, 12, 8, backend="eager"))
    rows = decode_race.race(racers, prompts(2), lambda done: None)
    assert [(row["answers"], row["equal"]) for row in rows] == [(2, 2)] * 5
    assert rows[-1]["kind"] == "compiled" and rows[-1]["best_plain"] != "compiled float32"
    assert rows[-1]["tau"] == 1.0
    ours = {
        **rows[0],
        "kind": "coral",
        "method": "coral full",
        "tokens_per_s": 3 * rows[-1]["tokens_per_s"],
        "other_share": 0.0,
    }
    found = decode.figures([*rows, ours])
    assert found["speedup_over_compiled"] == pytest.approx(3) and found["best"]["compiled"] == "compiled float32"
    assert found["compiled_answers"] == {"answers": 2, "equal": 2}
    assert found["compiled_over_plain"] == rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    assert "speedup_over_compiled" not in decode.figures([*rows[:-1], ours])


def test_an_untouched_model_is_transformers_own_and_leaves_the_target_as_it_is() -> None:
    model = tiny_target("llama").model
    kinds, ids_BT = {type(module) for module in model.modules()}, torch.tensor([[5, 6, 7]])
    own = decode_race.untouched(model)
    assert {type(module).__module__.split(".")[0] for module in own.modules()} == {"torch", "transformers"}
    assert own.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == attention.NAME
    assert {type(module) for module in model.modules()} == kinds
    torch.testing.assert_close(own(ids_BT).logits, model(ids_BT).logits, rtol=0, atol=1e-5)


def test_numbers_per_round_by_hand() -> None:
    """`other` is the engine's own and what the clock holds beyond; the tokens of the prefill belong to no round."""
    seconds = {"draft": 0.2, "other": 0.1, "verify": 0.6}
    lane = Lane(list(range(8)), 0.5, 1.0, [2, 3], [3, 4], seconds)
    found = decode_race.per_round([lane, lane])
    assert (found["rounds"], found["tau"], found["round_ms"], found["prefill_ms"]) == (4, 3.5, 500.0, 500.0)
    assert found["ms_by_phase"] == pytest.approx({"draft": 100.0, "verify": 300.0, "other": 100.0})
    assert found["other_share"] == pytest.approx(0.2)
    assert decode_race.speed([lane, lane]) == 7.0


@pytest.mark.parametrize("right", [0.0, 0.3, 0.7, 1.0])
def test_the_oracle_is_as_right_as_it_claims_and_loses_no_word(right: float) -> None:
    """Accepted drafts per round follow 1 + p + p² + …, so that a round's cost is measured at a known acceptance."""
    target, shape = unstopped(), TreeShape(depth=3, nodes=9, topk=3)
    tokens = 140
    emitted: list[int] = []
    for prompt in prompts(4):
        own = decode_race.run_lane(decode_race.plain(target, prompt, decode_race.Sampler(), tokens))
        lane = decode_oracle.forced(target, tiny_drafter(target), shape, prompt, own.ids, right)
        assert lane.ids == own.ids
        emitted += lane.emitted[:-1]  # the last round is cut by the answer's end
    chances = [right**level for level in range(1, 4)]
    variance = sum((2 * level - 1) * chance for level, chance in enumerate(chances, start=1)) - sum(chances) ** 2
    allowed = 3 * math.sqrt(variance / len(emitted))
    assert abs(sum(emitted) / len(emitted) - decode_oracle.expected_tau(right, 3)) <= allowed + 1e-9


def test_oracle_rows() -> None:
    target = unstopped()
    shape = TreeShape(depth=2, nodes=4, topk=2)
    rows = list(decode_oracle.measure(target, tiny_drafter(target), shape, prompts(1), 20))
    assert [row["right"] for row in rows] == list(decode_oracle.RIGHT)
    assert all(row["equal"] == 1 for row in rows)
    assert rows[0]["tau"] == 1.0
    assert rows[-1]["expected_tau"] == 3.0


def test_what_a_step_reads_by_hand() -> None:
    """Two layers of 32 wide, 4 heads on 2 of width 8, MLP 48, vocabulary 96: norms included, embeddings not read."""
    target = tiny_target("llama")
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    work = target_work(target, 10)
    assert work.weights == 2 * layer + 32 + 96 * 32
    assert work.cached_bytes == 2 * 2 * 2 * 8 * 10 * 4
    assert work.read_bytes() == 4 * work.weights + work.cached_bytes
    assert work.flops(3, 10) == 2 * 3 * work.weights + 3 * 10 * (4 * 2 * 4 * 8)
    parts = Parts(
        target, tiny_drafter(target), {"full": FullHead(target.lent)}, TreeShape(depth=2, nodes=4, topk=2), 10
    )
    own = 2 * 32 * 32 + layer - 32
    assert level_work(parts, parts.heads["full"]).weights == own + 96 * 32
    assert Machine(100.0, 10.0).floor_s(50, 20) == 2.0


def test_cost_rows() -> None:
    target = tiny_target("llama")
    heads = {"full": FullHead(target.lent)}
    parts = Parts(target, tiny_drafter(target), heads, TreeShape(depth=2, nodes=4, topk=2), 16)
    rows = list(decode_cost.measure(parts, 1, sizes=(1, 3)))
    assert [(row["what"], row.get("rows")) for row in rows] == [
        ("machine", None),
        ("verify", 1),
        ("verify", 3),
        ("draft level", 1),
        ("draft level", 4),
    ]
    assert rows[1]["over_one"] == 1.0


def test_the_gpu_part_runs_where_there_is_no_gpu_with_a_tiny_shape() -> None:
    rows = list(decode_gpu.measure("tiny", torch.device("cpu"), torch.float32, 1))
    assert {row["what"] for row in rows} == {"machine", "plain step", "verify", "draft level", "round", "projection"}
    found = decode_gpu.figures(rows)
    rounds = {name: found[f"round_{name}_over_plain"] for name in ("full", "grouped")}
    assert {"plain_over_floor", "verify60_over_plain"} < set(found)
    projected = [row for row in rows if row["what"] == "projection"]
    assert all(row["projected"] for row in projected)
    assert {row["tau"] for row in projected} == {4.52, 4.63, 4.90, 5.08}
    assert all(row["speedup"] == row["tau"] / rounds[row["head"]] for row in projected)


def test_the_gpu_part_measures_recorded_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tapes stand in for graphs: every timed call replays, and the figures are the recorded ones."""
    monkeypatch.setattr(recording, "record", tape.record)
    rows = [
        row for on in (False, True) for row in decode_gpu.measure("tiny", torch.device("cpu"), torch.float32, 1, on)
    ]
    plain = {row["graphs"]: row["over_floor"] for row in rows if row["what"] == "plain step"}
    assert decode_gpu.figures(rows)["plain_over_floor"] == plain[True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: nothing is skipped")
def test_without_a_gpu_the_gpu_part_says_that_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    decode.gpu(argparse.Namespace(shape="llama-3-8b", repeats=1))
    said = capsys.readouterr()
    assert "skipped, this machine has no CUDA device" in said.err
    assert said.out == ""
