"""The unroll is what drafting sees: step F of training equals the F-th drafting step with a cache."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coral_core.training import attention, unroll
from tests.training.helpers import HIDDEN, TAPS, tiny_batch, tiny_drafter, tiny_lent
from tests.training.reference import attend_eager

ROOT = Path(__file__).parents[2]
BATCH = tiny_batch([14, 9, 12], answers=[(5, 14), (1, 9), (8, 11)], pad_to=17)
SHAPES = {
    "eagle2": {},
    "eagle3": {"taps": TAPS},
    "eagle3.1": {"taps": TAPS, "norm_output": True, "fc_norm": True},
    "eagle3 norm first": {"taps": TAPS, "norm_before_residual": True},
}


class DraftCache:
    """Keys and values of the rows drafted so far: what an engine keeps. Independent of the unroll's code."""

    def __init__(self) -> None:
        self.key_JKE = self.value_JKE = None

    def attend(self, query_BHTE, key_BJTE, value_BJTE):
        """One sequence; new rows see the cached ones, and among themselves only what is not later."""
        old = 0 if self.key_JKE is None else self.key_JKE.shape[1]
        self.key_JKE = key_BJTE[0] if not old else torch.cat((self.key_JKE, key_BJTE[0]), 1)
        self.value_JKE = value_BJTE[0] if not old else torch.cat((self.value_JKE, value_BJTE[0]), 1)
        outs = []
        for head, query_TE in enumerate(query_BHTE[0]):
            group = head * len(self.key_JKE) // query_BHTE.shape[1]
            score_TK = query_TE @ self.key_JKE[group].T / query_TE.shape[-1] ** 0.5
            for new, row in enumerate(score_TK):
                row[old + new + 1 :] = -torch.inf
            outs.append(score_TK.softmax(-1) @ self.value_JKE[group])
        return torch.stack(outs)[None]


def draft_chain(drafter, lent, ids_T, feature_TD, root, steps):
    """Outputs [D] of `steps` drafting steps: rows 0 to root read the target's features, later ones the last output."""
    cache, outs = DraftCache(), []
    rows = torch.arange(root + 1)
    state_1TD = drafter.read(feature_TD[None, : root + 1])
    for _ in range(steps):
        embed_1TD = lent.embed(ids_T[rows + 1])[None]
        out_1TD = drafter(embed_1TD, state_1TD, drafter.rope(rows[None], embed_1TD.dtype), cache.attend)
        outs.append(drafter.hidden(out_1TD)[0, -1])
        rows, state_1TD = rows[-1:] + 1, out_1TD[:, -1:]
    return outs


@pytest.mark.parametrize(
    ("shape", "kv_heads"), [("eagle2", 1), *((shape, 2) for shape in SHAPES), ("eagle2", 4), ("eagle3", 4)]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_step_f_equals_the_fth_drafting_step(steps, shape, kv_heads):
    drafter, lent = tiny_drafter(kv_heads=kv_heads, **SHAPES[shape]), tiny_lent()
    with torch.no_grad():
        hiddens = unroll.unroll(drafter, lent, BATCH, steps)
        assert len(hiddens) == steps
        compared = 0
        for sequence, length in enumerate(BATCH.valid_BT.sum(1).tolist()):
            ids_T = BATCH.ids_BT[sequence, :length]
            feature_TD = BATCH.read_by(taps=shape != "eagle2")[sequence, :length]
            for root in range(length - steps):
                chain = draft_chain(drafter, lent, ids_T, feature_TD, root, steps)
                for step, out_D in enumerate(chain):
                    torch.testing.assert_close(hiddens[step][sequence, root + step], out_D, rtol=0, atol=1e-5)
                    compared += 1
    assert compared > 20


def test_rows_cut_off_on_the_right_change_nothing_before_them():
    drafter, lent = tiny_drafter(), tiny_lent()
    short = dataclasses.replace(
        BATCH, **{field.name: getattr(BATCH, field.name)[:, :8] for field in dataclasses.fields(BATCH)}
    )
    with torch.no_grad():
        whole, cut = (unroll.unroll(drafter, lent, batch, 3) for batch in (BATCH, short))
    for whole_BTD, cut_BTD in zip(whole, cut, strict=True):
        torch.testing.assert_close(whole_BTD[:, :7], cut_BTD, rtol=0, atol=1e-5)


def test_what_each_row_sees_drawn():
    """Five rows, three steps: which stream each row of step 3 takes each column from (. is unseen).

    Stream s's value at column c is the number 10 s + c, scores are all equal, so a row's output is the mean of what
    it sees.
    """
    drawing = [
        "2 . . . .",
        "1 2 . . .",
        "0 1 2 . .",
        "0 0 1 2 .",
        "0 0 0 1 2",
    ]
    seen = [[10 * int(s) + c for c, s in enumerate(line.split()) if s != "."] for line in drawing]
    expected_T = torch.tensor([sum(row) / len(row) for row in seen])
    zeros = torch.zeros(1, 1, 5, 8)
    values = [(10 * stream + torch.arange(5.0))[None, None, :, None].expand(1, 1, 5, 8) for stream in range(3)]
    for attend in (attend_eager, attention.attend_fast):
        out_BHTE = attend(zeros, [zeros] * 3, values)
        torch.testing.assert_close(out_BHTE[0, 0, :, 0], expected_T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 3, 33, 300])
def test_fast_attention_equals_eager_in_outputs_and_gradients(steps, rows):
    torch.manual_seed(steps * rows)
    tensors = [(torch.randn(2, 4, rows, 16) * 1.5).requires_grad_() for _ in range(1 + 2 * steps)]
    query, keys, values = tensors[0], tensors[1 : 1 + steps], tensors[1 + steps :]
    grad_BHTE = torch.randn(2, 4, rows, 16)
    outs, grads = [], []
    for attend in (attend_eager, attention.attend_fast):
        out_BHTE = attend(query, keys, values)
        outs.append(out_BHTE)
        grads.append(torch.autograd.grad(out_BHTE, tensors, grad_BHTE, materialize_grads=True))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
    for fast, eager in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 3])
def test_fast_attention_on_a_gpu_equals_eager(dtype, steps):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(steps)
    tensors = [torch.randn(2, 4, 100, 64, device="cuda", dtype=dtype) for _ in range(2 + 2 * steps)]
    results = []
    for attend, kind in ((attend_eager, torch.float32), (attention.attend_fast, dtype)):
        query, grad_BHTE, *streams = [tensor.to(kind).requires_grad_() for tensor in tensors]
        out_BHTE = attend(query, streams[:steps], streams[steps:])
        grads = torch.autograd.grad(out_BHTE, [query, *streams], grad_BHTE.detach(), materialize_grads=True)
        results.append([out_BHTE, *grads])
    bound = 1e-4 if dtype == torch.float32 else 5e-2  # bf16 gradients here are of size 2 to 4
    for fast, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(fast.float(), eager, rtol=bound, atol=bound)


def test_weights_get_the_same_gradient_from_both_attentions():
    lent, grads = tiny_lent(), []
    for attend in (attend_eager, attention.attend_fast):
        drafter = tiny_drafter()
        embed_BTD, feature_BTD = lent.embed(BATCH.ids_BT[:, 1:]), BATCH.feature_BTD[:, :-1]
        rows_BT = BATCH.valid_BT[:, 1:]
        hiddens = unroll.unroll_rows(drafter, (embed_BTD, feature_BTD), [rows_BT] * 4, attend)
        sum((hidden_BTD[rows_BT] ** 2).mean() for hidden_BTD in hiddens).backward()
        grads.append({name: parameter.grad for name, parameter in drafter.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_memory_of_the_fast_attention_does_not_grow_with_the_square():
    """Largest tensor that autograd keeps for backward: O(T) elements per head, where eager keeps T x T."""
    rows, largest = 256, {}
    for attend in (attend_eager, attention.attend_fast):
        saved = []
        tensors = [torch.randn(1, 2, rows, 8, requires_grad=True) for _ in range(7)]

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(tensors[0], tensors[1:4], tensors[4:])
        largest[attend] = max(saved)
    assert largest[attention.attend_fast] <= 2 * rows * 8
    assert largest[attend_eager] >= 2 * rows * rows


LONG = """
import pathlib, torch
from coral_core.training.attention import attend_fast

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def tensors(rows):
    return [torch.randn(1, 2, rows, 16, requires_grad=True) for _ in range(7)]

def step(query, *streams):
    attend_fast(query, streams[:3], streams[3:]).square().sum().backward()

torch.set_num_threads(1)
step(*tensors(64))
inputs = tensors(8192)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(*inputs)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_forward_and_backward_at_8192_rows():
    """One head's scores alone would be 256 MiB; the 7 inputs and as many gradients are 14 MiB."""
    done = subprocess.run([sys.executable, "-c", LONG], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 64 << 20


def test_streams_are_detached_but_their_keys_learn():
    """Step 2's loss reaches k_proj through stream 1's keys, and nothing through stream 1 itself."""
    drafter, lent = tiny_drafter(), tiny_lent()
    hiddens = unroll.unroll(drafter, lent, BATCH, 2)
    (grad,) = torch.autograd.grad(hiddens[1].sum(), hiddens[0], allow_unused=True)
    assert grad is None
    (grad,) = torch.autograd.grad(hiddens[1][:, 3].sum(), drafter.layers[0].self_attn.k_proj.weight)
    assert grad.abs().max() > 0


def test_gradients_run_through_all_steps_where_that_is_asked_for():
    """Every weight's gradient is that of finite differences, which detached streams would miss; so are the outputs."""
    lent, batch = tiny_lent(), BATCH
    drafter = tiny_drafter(taps=TAPS).double()
    double = dataclasses.replace(batch, tap_BTI=batch.tap_BTI.double())
    lent = dataclasses.replace(lent, embed_VD=lent.embed_VD.double(), head_VD=lent.head_VD.double())

    def loss(attend=attend_eager):
        embed_BTD, read_BTI = lent.embed(double.ids_BT[:, 1:]), double.tap_BTI[:, :-1]
        rows = [double.valid_BT[:, 1:]] * 3
        outs = unroll.unroll_rows(drafter, (embed_BTD, drafter.read(read_BTI)), rows, attend, through=True)
        return outs[-1][double.valid_BT[:, 1:]].square().mean() + outs[-1][0, 4, 3]

    loss().backward()
    for name in ("fc.weight", "layers.0.self_attn.k_proj.weight", "layers.0.hidden_norm.weight", "norm.weight"):
        weight = drafter.get_parameter(name)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        slope = []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * 1e-5 * direction
                slope.append(float(loss()))
                weight -= sign * 1e-5 * direction
        assert (weight.grad * direction).sum() == pytest.approx((slope[0] - slope[1]) / 2e-5, rel=1e-4), name


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_computing_only_what_is_needed_changes_no_wanted_row_and_no_gradient(steps):
    lent, wanted_BT = tiny_lent(), unroll.loss_rows(BATCH)
    found = []
    for wanted in (None, wanted_BT):
        drafter = tiny_drafter()
        hiddens = unroll.unroll(drafter, lent, BATCH, steps, wanted_BT=wanted)
        chosen = torch.stack([hidden_BTD[wanted_BT] for hidden_BTD in hiddens])
        (chosen**2).mean().backward()
        found.append((chosen.detach(), [parameter.grad for parameter in drafter.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    for part, whole in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


def test_needed_rows_drawn():
    """w wanted, . valid, x padding; then what steps 1 to 4 compute: the last its wanted rows, each earlier one more."""
    drawing = "....w.ww.xx"
    expected = ["01111111000", "00111111000", "00011111000", "00001011000"]
    valid_BT, wanted_BT = (torch.tensor([[letter in letters for letter in drawing]]) for letters in (".w", "w"))
    masks = unroll.needed_rows(valid_BT, wanted_BT, 4)
    assert ["".join(str(int(x)) for x in mask_BT[0]) for mask_BT in masks] == expected
    (alone_BT,) = unroll.needed_rows(valid_BT, wanted_BT, 1)
    assert torch.equal(alone_BT, wanted_BT), "of the prompt's rows, the only step takes keys and values alone"


def test_loss_rows_drawn():
    """p prompt, a answer, e its stop token, . padding; row r drafts token r+2, so it is marked two places to the left.

    The first answer token is the target's own pick and is never drafted; every later one is, the stop token included.
    """
    tokens = ["pppaae..", "ppaepaae", "paaaaaaa"]
    expected = [
        #  0  1  2  3  4  5  6
        [0, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 0],
    ]
    answer_BT = torch.tensor([[letter in "ae" for letter in line] for line in tokens])
    batch = dataclasses.replace(BATCH, answer_BT=answer_BT)
    assert unroll.loss_rows(batch).int().tolist() == expected


def test_noise_depends_on_a_sequence_s_own_length_not_on_its_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 8]
    batch = tiny_batch(lengths, [(1, 3), (1, 3)], pad_to=400)
    noise_BTI = unroll.feature_noise(batch, 0.2, generator)
    for noise_TI, length in zip(noise_BTI, lengths, strict=True):
        assert noise_TI.abs().max() == pytest.approx(0.1 * 512 / length, rel=0.01)
    assert noise_BTI.shape == (2, 399, HIDDEN)
    assert unroll.feature_noise(batch, 0.2, generator, taps=True).shape == (2, 399, 3 * HIDDEN)
