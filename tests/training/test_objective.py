"""One batch's loss: what counts, what does not."""

import dataclasses

import pytest
import torch

from coral_core.training.objective import Objective, pack
from coral_core.training.unroll import Unroll, loss_rows, unroll
from tests.training import reference
from tests.training.helpers import tiny_batch, tiny_drafter, tiny_lent

CORAL = Objective(topk_weight=1.0, topk=5, csra_weight=0.1)
LENGTHS, ANSWERS = [14, 9, 12], [(5, 14), (1, 9), (8, 11)]


def loss_of(batch, objective=CORAL, steps=3):
    drafter, lent = tiny_drafter(), tiny_lent()
    total, parts = objective(unroll(drafter, lent, batch, steps), batch, lent)
    total.backward()
    return total.detach(), parts, {name: parameter.grad for name, parameter in drafter.named_parameters()}


def test_padding_changes_neither_the_loss_nor_a_gradient():
    """The bug of `.mean()` over a padded tensor: padding became a learning-rate knob."""
    (plain, parts, grads), (padded, padded_parts, padded_grads) = (
        loss_of(tiny_batch(LENGTHS, ANSWERS, pad_to=width)) for width in (14, 40)
    )
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-6)
    for name, part in parts.items():
        torch.testing.assert_close(padded_parts[name], part, rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(padded_grads[name], grad, rtol=1e-4, atol=1e-4)


def test_a_batch_is_the_sum_of_its_sequences():
    batch = tiny_batch(LENGTHS, ANSWERS)
    alone = [
        dataclasses.replace(batch, **{f.name: getattr(batch, f.name)[row : row + 1] for f in dataclasses.fields(batch)})
        for row in range(len(LENGTHS))
    ]
    together = loss_of(batch)[0]
    torch.testing.assert_close(torch.stack([loss_of(one)[0] for one in alone]).sum(), together, rtol=1e-5, atol=1e-4)


def test_parts_add_up_to_the_loss_and_match_the_references():
    batch, drafter, lent = tiny_batch(LENGTHS, ANSWERS), tiny_drafter(), tiny_lent()
    hiddens = unroll(drafter, lent, batch, 3)
    total, parts = CORAL(hiddens, batch, lent)
    summed = parts["regression"] + 0.1 * parts["distill"] + parts["topk"] + 0.1 * parts["csra"]
    torch.testing.assert_close(total.detach(), summed, rtol=1e-5, atol=1e-4)
    rows_BT = loss_rows(batch)
    feature_ND = batch.feature_BTD[:, 1:][rows_BT]
    expected = sum(reference.topk(hidden_BTD[rows_BT], feature_ND, lent, 5) for hidden_BTD in hiddens) / 3
    torch.testing.assert_close(parts["topk"], expected.detach(), rtol=1e-5, atol=1e-4)
    drafted_N, wanted_N = (lent.logits(x_ND).argmax(-1) for x_ND in (hiddens[1][rows_BT], feature_ND))
    assert parts["accuracy_2"].item() == (drafted_N == wanted_N).sum().item()


@pytest.mark.parametrize(
    ("objective", "steps", "absent"),
    [(Objective(), 1, {"csra", "accuracy_2"}), (dataclasses.replace(CORAL, csra_weight=0.0), 3, {"csra"})],
    ids=["eagle2", "hass"],
)
def test_the_simpler_methods_are_the_same_loss_with_less(objective, steps, absent):
    total, parts, _ = loss_of(tiny_batch(LENGTHS, ANSWERS), objective, steps)
    assert absent.isdisjoint(parts)
    weights = {"regression": 1.0, "distill": 0.1, "topk": objective.topk_weight}
    assert total.item() == pytest.approx(sum(weight * parts[name].item() for name, weight in weights.items()), rel=1e-5)


def test_only_the_last_step_is_trained_where_it_is_drawn():
    """Its losses are those of one step, no gradient reaches the earlier outputs, and alignment pulls it to them."""
    batch, drafter, lent = tiny_batch(LENGTHS, ANSWERS), tiny_drafter(), tiny_lent()
    hiddens = [hidden_BTD.detach().requires_grad_() for hidden_BTD in unroll(drafter, lent, batch, 3)]
    last_only = dataclasses.replace(CORAL, last_only=True)
    total, parts = last_only(hiddens, batch, lent)
    total.backward()
    assert [hidden_BTD.grad is None for hidden_BTD in hiddens] == [True, True, False]
    assert {"accuracy_3"} == {name for name in parts if name.startswith("accuracy")}
    alone, words = dataclasses.replace(CORAL, csra_weight=0.0)(hiddens[2:], batch, lent)
    torch.testing.assert_close(total, alone + 0.1 * parts["csra"])
    assert parts["csra"] > 0
    assert parts["accuracy_3"] == words["accuracy_1"]
    assert last_only(hiddens[:1], batch, lent)[0].item() == pytest.approx(CORAL(hiddens[:1], batch, lent)[0].item())


def test_a_batch_without_an_answer_costs_nothing():
    total, _, grads = loss_of(tiny_batch([6, 5], [(0, 0), (3, 4)]))
    assert total.item() == 0
    assert all(grad is None or not grad.any() for grad in grads.values())


def test_pack_drawn():
    F, T = False, True
    row_BN, present_BN = pack(torch.tensor([[F, T, F, T], [F, F, F, F], [F, F, T, F]]))
    assert row_BN[0].tolist() == [1, 3]
    assert row_BN[2, 0].item() == 2
    assert present_BN.tolist() == [[T, T], [F, F], [T, F]]


def test_bf16_products_on_a_cpu_have_few_shapes():
    """oneDNN compiles a kernel for each new shape: dialogues of other lengths must not bring new ones, 5 ms each."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.name() and args[0].dtype == torch.bfloat16:
                self.seen.add((func.name(), *(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    lent, drafter = tiny_lent().to("cpu", torch.bfloat16), tiny_drafter()
    seen, pairs = [], {}
    for lengths in ([14, 9], [13, 7]):
        batch = tiny_batch(lengths, answers=[(2, length) for length in lengths])
        with Shapes() as shapes:
            with torch.autocast("cpu", torch.bfloat16):
                hiddens = Unroll(drafter, 3)(lent, batch)
            loss, _ = Objective(topk_weight=1.0)(hiddens, batch, lent)
            loss.backward()
        seen.append(shapes.seen)
        exact, _ = Objective(topk_weight=1.0)(Unroll(drafter, 3)(tiny_lent(), batch), batch, tiny_lent())
        pairs[loss.item()] = exact.item()
    assert seen[0] == seen[1] != set()
    for mixed, exact in pairs.items():
        assert mixed == pytest.approx(exact, rel=2e-2)
