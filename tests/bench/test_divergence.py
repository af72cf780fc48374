"""A rounding tie is told from a bug."""

import pytest

from coral_core.bench import divergence
from coral_core.bench.divergence import diverges
from coral_core.decoding.plain import plain
from coral_core.decoding.sampling import Sampler
from tests.tiny import tiny_target

PROMPT = [5, 6, 7]


def answer(sampler: Sampler) -> list[int]:
    return [token for event in plain(tiny_target(), PROMPT, sampler, 8) for token in event.new_ids]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_token_is_no_tie(temperature: float) -> None:
    sampler = Sampler(temperature=temperature, seed=3)
    right = answer(sampler)
    wrong = [*right[:4], (right[4] + 1) % 96, *right[5:]]
    found = diverges(tiny_target(), sampler, PROMPT, right, wrong)
    assert found is not None
    assert (found["position"], found["plain"], found["speculative"]) == (4, right[4], wrong[4])
    assert found["rounding"] < 1e-4 < found["logit_gap"], "in float32 nothing moves by as much as a wrong token's gap"
    assert not found["tie"]


def test_a_gap_that_rounding_spans_is_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = {1: 0.01, 2: 0.02, 4: -0.01, 8: 0.0, 16: 0.01}
    monkeypatch.setattr(divergence, "_difference", lambda target, sampler, context, pair, rows: gaps[rows])
    found = diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1, 3])
    assert found is not None
    assert (found["logit_gap"], found["tie"]) == (0.01, True)
    assert found["rounding"] == pytest.approx(0.03)


def test_equal_and_cut_answers() -> None:
    assert diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1, 2]) is None
    found = diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1])
    assert found == {"position": 1, "reason": "one answer is longer", "tie": False}
