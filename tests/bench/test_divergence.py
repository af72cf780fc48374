"""A rounding tie is told from a bug."""

import dataclasses
from collections.abc import Callable

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


def told(monkeypatch: pytest.MonkeyPatch, scores: Callable[[divergence.Pass], torch.Tensor]) -> None:
    """A target whose logits depend so on the rows beside them."""
    monkeypatch.setattr(divergence, "_scores", lambda target, sampler, context, form: scores(form))
    monkeypatch.setattr(divergence, "first_operation", lambda target, context: "layers.0.mlp")


def test_a_gap_that_rounding_spans_is_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens 1 and 2 with 5.00 and 5.01, which another number of rows turns round."""
    scores = {1: [0.0, 5.0, 5.01], 2: [0.0, 5.0, 5.02], 4: [0.0, 5.0, 4.99], 8: [0.0, 5.0, 5.0], 16: [0.0, 5.0, 5.01]}
    told(monkeypatch, lambda form: torch.tensor(scores[form.rows]))
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
    told(monkeypatch, lambda form: score_V)
    found = diverges(target, Sampler(), PROMPT, [0, 1], [0, 2])
    assert found is not None
    assert found["tie"] == tie


def test_equal_and_cut_answers() -> None:
    assert diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1, 2]) is None
    found = diverges(tiny_target(), Sampler(), PROMPT, [1, 2], [1])
    assert found == {"position": 1, "reason": "one answer is longer", "tie": False}


CONTEXT = list(range(3, 43))


@pytest.mark.parametrize("form", divergence.OTHERS)
def test_every_company_reads_the_same_context(form: divergence.Pass) -> None:
    target = tiny_target()
    alone = divergence._scores(target, Sampler(), CONTEXT, divergence.ALONE)
    assert torch.allclose(divergence._scores(target, Sampler(), CONTEXT, form), alone, atol=1e-5)


def test_exact_forwards_leave_no_tie() -> None:
    """A difference that no operation explains is a bug, however near the two tokens are."""
    target = tiny_target()
    assert target.exact and divergence.first_operation(target, CONTEXT) is None
    said = answer(Sampler())
    found = diverges(target, Sampler(), PROMPT, said, [*said[:4], (said[4] + 1) % 96])
    assert found is not None
    assert (found["operation"], found["tie"]) == (None, False)


@pytest.mark.parametrize(
    ("module", "named"),
    [("layers.1.mlp.up_proj", "layers.1.mlp.up_proj"), ("layers.1.self_attn", "before layers.1.self_attn.o_proj")],
)
def test_the_first_operation_that_rounds_otherwise_is_named(
    module: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a product, and of attention, which is no module: the last bit depends on the number of rows."""
    target = tiny_target()
    layer = target.model.base_model.get_submodule(module)
    spoilt = layer.o_proj if module.endswith("attn") else layer

    def nudge(x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD * (1 + 1e-6 * (x_BTD.shape[1] > 4))

    if spoilt is layer:
        handle = spoilt.register_forward_hook(lambda _module, _args, out: nudge(out))
    else:
        handle = spoilt.register_forward_pre_hook(lambda _module, args: (nudge(args[0]),))
    try:
        assert divergence.first_operation(target, CONTEXT) == named
    finally:
        handle.remove()
