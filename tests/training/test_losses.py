"""The losses, against numbers that can be checked by hand and against their eager references."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coral_core.lent import Lent
from coral_core.training import losses
from coral_core.training.candidates import HeadRows
from tests.training import reference
from tests.training.helpers import HIDDEN, tiny_lent

ROOT = Path(__file__).parents[2]
IDENTITY = Lent(torch.eye(3), torch.eye(3))
"""Three words whose logits are the feature itself."""


def test_regression_by_hand():
    """Smooth L1 is d²/2 below one and d - 1/2 above: rows (0.5, 2) and (0, 0) give (0.125 + 1.5) / 2 and 0."""
    hidden_ND, feature_ND = torch.tensor([[1.5, 2.0], [3.0, 3.0]]), torch.tensor([[1.0, 4.0], [3.0, 3.0]])
    assert losses.regression(hidden_ND, feature_ND).item() == pytest.approx((0.125 + 1.5) / 2)


def test_distillation_by_hand():
    """p = (1/2, 1/4, 1/4), q uniform: -Σ p log 1/3 = log 3; q = p: the entropy, 1.5 log 2."""
    feature_ND = torch.tensor([[2.0, 1.0, 1.0]]).log()
    assert reference.distill(torch.zeros(1, 3), feature_ND, IDENTITY).item() == pytest.approx(math.log(3))
    assert reference.distill(feature_ND, feature_ND, IDENTITY).item() == pytest.approx(1.5 * math.log(2))


def test_topk_by_hand_keeps_p_as_it_is():
    """Of p = (1/2, 1/3, 1/6) the two best carry 5/6, not 1: with q uniform, 5/6 log 3."""
    feature_ND = torch.tensor([[3.0, 2.0, 1.0]]).log()
    assert reference.topk(torch.zeros(1, 3), feature_ND, IDENTITY, 2).item() == pytest.approx(5 / 6 * math.log(3))


LENTS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "capped": {"logit_softcap": 4.0, "logit_scale": 0.7},
}


@pytest.mark.parametrize("scalars", LENTS.values(), ids=LENTS)
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_chunked_vocabulary_loss_equals_the_references(scalars, rows_per_chunk, monkeypatch):
    lent = tiny_lent(**scalars)
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows_per_chunk)
    torch.manual_seed(0)
    hidden_SND, feature_ND = torch.randn(3, 11, HIDDEN, requires_grad=True), torch.randn(11, HIDDEN)
    weights = (0.1, 0.9)
    total_S, parts = losses.vocabulary(hidden_SND, feature_ND, HeadRows.whole(lent), weights, 5)
    total = total_S.sum()
    (grad_SND,) = torch.autograd.grad(total * 2.0, hidden_SND)

    distill = torch.stack([reference.distill(hidden_ND, feature_ND, lent) for hidden_ND in hidden_SND])
    topk = torch.stack([reference.topk(hidden_ND, feature_ND, lent, 5) for hidden_ND in hidden_SND])
    expected = weights[0] * distill.sum() + weights[1] * topk.sum()
    (expected_grad_SND,) = torch.autograd.grad(expected * 2.0, hidden_SND)
    agree_SN = lent.logits(hidden_SND).argmax(-1) == lent.logits(feature_ND).argmax(-1)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.distill_S, distill.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.topk_S, topk.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_SND, expected_grad_SND, rtol=1e-4, atol=1e-5)
    assert parts.agree_S.tolist() == agree_SN.sum(1).tolist()


def test_vocabulary_loss_keeps_no_tensor_of_width_v():
    """What autograd holds between forward and backward is one [S,N,D] gradient, whatever V."""
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    lent = Lent(torch.randn(1000, 8), torch.randn(1000, 8))
    hidden_SND = torch.randn(3, 50, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses.vocabulary(hidden_SND, torch.randn(50, 8), HeadRows.whole(lent), (0.1, 1.0), 10)
    assert max(saved) <= 3 * 50 * 8


def test_no_rows_give_zero_and_no_gradient():
    hidden_SND = torch.zeros(2, 0, HIDDEN, requires_grad=True)
    total_S, parts = losses.vocabulary(hidden_SND, torch.zeros(0, HIDDEN), HeadRows.whole(tiny_lent()), (0.1, 1.0), 5)
    total_S.sum().backward()
    assert total_S.tolist() == [0, 0]
    assert parts.agree_S.tolist() == [0, 0]


LARGE = """
import pathlib, torch
from coral_core.lent import Lent
from coral_core.training.objective import Objective
from coral_core.store.batches import Batch

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

torch.set_num_threads(1)
V, T, D = 151936, 2048, 64
lent = Lent(*(torch.randn(V, D) for _ in range(2)))
answer_BT = torch.arange(T)[None] > 1
batch = Batch(torch.randint(V, (1, T)), answer_BT, torch.ones_like(answer_BT), torch.randn(1, T, D))
hiddens = [torch.randn(1, T - 1, D, requires_grad=True) for _ in range(3)]
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
Objective(topk_weight=1.0, csra_weight=0.1)(hiddens, batch, lent)[0].backward()
assert all(hidden.grad.abs().sum() > 0 for hidden in hiddens)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_the_whole_loss_at_the_largest_vocabulary():
    """V = 151,936, T = 2,048, n = 3: under 2 GiB; one [T,V] tensor alone is 1.2 GiB, and the eager loss keeps nine."""
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 2 << 30
