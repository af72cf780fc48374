"""A rounding tie is told from a bug."""

import dataclasses

import pytest
import torch

from coral_core.bench import divergence
from coral_core.bench.divergence import diverges
from coral_core.decoding.engine import plain
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
    """Tokens 1 and 2 with 5.00 and 5.01, which another number of rows turns round."""
    scores = {1: [0.0, 5.0, 5.01], 2: [0.0, 5.0, 5.02], 4: [0.0, 5.0, 4.99], 8: [0.0, 5.0, 5.0], 16: [0.0, 5.0, 5.01]}
    monkeypatch.setattr(divergence, "_scores", lambda target, sampler, context, rows: torch.tensor(scores[rows]))
    found = diverges(tiny_target(), Sampler(), PROMPT, [0, 1], [0, 2])
    assert found is not None
    assert found["tie"]
    assert found["logit_gap"] == pytest.approx(0.01, abs=1e-6)
    assert found["rounding"] == pytest.approx(0.03, abs=2e-6)


@pytest.mark.parametrize(("gap", "tie"), [(0.03, True), (0.05, False)])
def test_bfloat16_cannot_tell_neighbours_apart(monkeypatch: pytest.MonkeyPatch, gap: float, tie: bool) -> None:
    """Logits near 5 are 2^-7 * 5 = 0.039 apart at worst."""
    target = dataclasses.replace(tiny_target(), lent=tiny_target().lent.to("cpu", torch.bfloat16))
    score_V = torch.tensor([0.0, 5.0, 5.0 - gap])
    monkeypatch.setattr(divergence, "_scores", lambda target, sampler, context, rows: score_V)
    found = diverges(target, Sampler(), PROMPT, [0, 1], [0, 2])
    assert found is not None
    assert found["tie"] == tie


def test_equal_and_cut_answers() -> None:
    assert diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1, 2]) is None
    found = diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1])
    assert found == {"position": 1, "reason": "one answer is longer", "tie": False}
