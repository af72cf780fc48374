"""The attention plug-in answers what transformers' own function answers, and is what a masked forward on a CPU uses."""

import pytest
import torch
import transformers

from coral_core.kernels import attention
from tests.tiny import tiny_target


class Module(torch.nn.Module):
    num_key_value_groups = 4
    is_causal = True


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_the_answer_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, rows: int, masked: bool, folded: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 8, rows, 16)
    key, value = torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    sees = torch.rand(2, 1, rows, 12) < 0.7
    sees[..., 0] = True
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min) if masked else None
    monkeypatch.setattr(attention, "MANY_KEYS", 1 if folded else 1 << 30)
    theirs = transformers.AttentionInterface()["sdpa"](Module(), query, key, value, mask, scaling=0.3)[0]
    ours = attention.attend(Module(), query, key, value, mask, scaling=0.3)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_target_on_a_cpu_reads_grouped_keys_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    assert target.model.config._attn_implementation == attention.NAME
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: pytest.fail("keys were copied"))
    sees = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~sees, torch.finfo(torch.float32).min)
    target.forward(torch.tensor([[5, 6, 7, 8]]), position_BT=torch.arange(4)[None], mask=mask)


def test_a_model_that_does_not_attend_by_pytorchs_kernels_is_left_alone() -> None:
    assert tiny_target("gemma2-mixed").model.config._attn_implementation == "eager"
