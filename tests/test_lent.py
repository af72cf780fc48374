"""What the target lends: saved whole, and the same products however few rows there are."""

import dataclasses
from pathlib import Path

import pytest
import torch

from coral_core.kernels.layers import FILL
from coral_core.lent import Lent
from coral_core.store.store import load_lent, save_lent
from tests.tiny import tiny_target


def a_lent(tied: bool = False) -> Lent:
    torch.manual_seed(0)
    embed_VD, head_VD = torch.randn(2, 1100, 256)
    return Lent(embed_VD, embed_VD if tied else head_VD, torch.randn(1100), logit_scale=0.5, logit_softcap=30.0)


@pytest.mark.parametrize("rows", [1, 2, 9, 300])
def test_few_rows_take_the_packed_head_and_give_the_same(rows: int) -> None:
    lent = a_lent()
    feature_XD = torch.randn(rows, 256)
    expected_XV = lent.transform(feature_XD @ lent.head_VD.T + lent.head_bias_V)
    with torch.no_grad():
        torch.testing.assert_close(lent.logits(feature_XD), expected_XV, rtol=0, atol=1e-4)  # logits of up to 30
        torch.testing.assert_close(lent.logits(feature_XD[None]), expected_XV[None], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """A small head of 2,048 numbers, which the kernels add in another order when there is one row."""
    torch.manual_seed(0)
    embed_VD = torch.randn(300, 2048).to(dtype)
    lent, feature_ND = Lent(embed_VD, embed_VD), torch.randn(9, 2048).to(dtype)
    with torch.no_grad():
        logits_NV = lent.logits(feature_ND)
        for rows in (1, 2, 3, 5):
            assert torch.equal(lent.logits(feature_ND[:rows]), logits_NV[:rows])


def test_a_row_alone_is_filled_up_for_exact_forwards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tiny_target(), []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("coral_core.lent.packs", lambda _: False)
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x_ND, *rest: seen.append(len(x_ND)) or linear(x_ND, *rest)
    )
    for exact in (True, False):
        logits_1V = dataclasses.replace(target, exact=exact).logits(torch.ones(1, target.lent.head_VD.shape[1]))
        assert logits_1V.shape == (1, len(target.lent.head_VD))
    assert seen == [FILL, 1]


def test_gradients_flow_through_few_rows() -> None:
    feature_XD = torch.randn(4, 256, requires_grad=True)
    a_lent().logits(feature_XD).sum().backward()
    assert feature_XD.grad is not None


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_read_back(tmp_path: Path, tied: bool) -> None:
    lent = a_lent(tied)
    save_lent(lent, tmp_path / "lent.safetensors")
    again = load_lent(tmp_path / "lent.safetensors")
    assert (again.head_VD is again.embed_VD) == tied
    for field in dataclasses.fields(Lent):
        old, new = getattr(lent, field.name), getattr(again, field.name)
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    moved = again.to("cpu", torch.bfloat16)
    assert (moved.head_VD is moved.embed_VD) == tied
    assert moved.head_VD.dtype == torch.bfloat16
