"""The benchmark of training compares two ways to one number."""

import dataclasses

import torch

from benchmarks import train
from coral_core.training.unroll import Unroll
from tests.training.helpers import tiny_batch, tiny_drafter, tiny_lent


def test_the_eager_reference_computes_the_same_loss_and_gradients():
    batch, lent, found = tiny_batch([14, 9], [(5, 14), (1, 9)], pad_to=17), tiny_lent(), []
    for loss_of in train.LOSSES.values():
        model = Unroll(tiny_drafter(), 3)
        loss = loss_of(model, lent, batch)
        loss.backward()
        found.append((loss.detach(), [weight.grad for weight in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    for fast, eager in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)


def test_a_step_is_told_by_its_parts():
    config = dataclasses.asdict(tiny_drafter().config)
    form = train.Form.make(config, 16, torch.float32)
    parts = form.step(tiny_batch([14, 9], [(5, 14), (1, 9)]))
    assert list(parts) == ["unroll", "loss", "backward", "update", "vocabulary", "alignment"]
    assert min(parts.values()) > 0
    assert len(form.objective.candidates.frequent_C) == 12


def test_figures_are_ratios_where_both_variants_fit():
    def row(variant, length, **measured):
        return {"variant": variant, "length": length, "precision": "float32", **measured}

    rows = [
        row("fast", 2048, tokens_per_s=30.0, peak_bytes=10),
        row("eager", 2048, tokens_per_s=10.0, peak_bytes=40),
        row("fast", 8192, tokens_per_s=30.0, peak_bytes=10),
        row("eager", 8192, out_of_memory=True),
    ]

    def form(variant, precision, step_s):
        return {"shape": "a", "vocabulary": 9, "variant": variant, "precision": precision, "step_s": step_s}

    rows += [form("whole", "float32", 8.0), form("candidates", "float32", 4.0), form("candidates", "bfloat16", 2.0)]
    assert train.figures(rows) == {
        "tokens_per_s_over_eager_2048": 3.0,
        "peak_bytes_over_eager_2048": 0.25,
        "step_whole_float32_over_whole_9": 1.0,
        "step_candidates_float32_over_whole_9": 0.5,
        "step_candidates_bfloat16_over_whole_9": 0.25,
    }
