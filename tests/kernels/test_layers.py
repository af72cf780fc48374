"""Packed linear layers: the same products, whatever happened to the weights since, and a model that stays a model."""

import copy
import warnings

import psutil
import pytest
import torch
from torch import nn

from coral_core.kernels import layers
from coral_core.kernels.layers import ALONE, LARGE, Packed, PackedLinear, pack, packs


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every packed product."""
    rows: list[int] = []
    linear = Packed.linear

    def counting(self: Packed, x_XI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(x_XI.numel() // x_XI.shape[-1])
        return linear(self, x_XI, bias_O)

    monkeypatch.setattr(Packed, "linear", counting)
    return rows


SIZES = [(48, 32), (ALONE // 512, 512), (LARGE // 512, 512)]


@pytest.mark.parametrize("size", SIZES, ids=["small", "for a row alone", "large"])
@pytest.mark.parametrize("rows", [1, 3, 4, 300])
def test_the_product_is_that_of_the_plain_layer(monkeypatch: pytest.MonkeyPatch, size: tuple, rows: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(size[1], size[0])
    own, x_BTI = nn.Sequential(copy.deepcopy(plain)), torch.randn(1, rows, size[1])
    pack(own, [own])
    seen = spied(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(own(x_BTI), plain(x_BTI), rtol=0, atol=1e-5)
    gains = rows > 1 or size[0] * size[1] >= ALONE
    assert seen == ([rows] if gains and packs(plain.weight) else [])


@pytest.mark.parametrize(("instructions", "rows"), [("AVX512", layers.FILL), ("AVX2", 1)])
def test_a_row_alone_is_filled_up_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, instructions: str, rows: int
) -> None:
    weight_OI = torch.randn(LARGE // 512, 512)
    if not packs(weight_OI):
        pytest.skip("this PyTorch has no packed products")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    packed, seen = Packed(weight_OI), []
    product = packed._product
    monkeypatch.setattr(packed, "_product", lambda x_NI, *rest: seen.append(len(x_NI)) or product(x_NI, *rest))
    torch.testing.assert_close(packed.linear(torch.ones(1, 512)), weight_OI.sum(1)[None], rtol=0, atol=1e-2)
    assert seen == [rows]


def test_a_weight_that_was_trained_moved_or_loaded_since_is_packed_anew() -> None:
    torch.manual_seed(0)
    layer, x_NI = PackedLinear(32, 48), torch.randn(3, 32)

    def right() -> None:
        with torch.no_grad():
            expected = nn.functional.linear(x_NI.to(layer.weight.dtype), layer.weight, layer.bias)
            torch.testing.assert_close(layer(x_NI.to(layer.weight.dtype)), expected, rtol=0, atol=1e-5)

    right()
    layer(x_NI).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    right()
    layer.load_state_dict(nn.Linear(32, 48).state_dict())
    right()
    layer.load_state_dict(nn.Linear(32, 48).state_dict(), assign=True)
    right()
    layer.double()
    right()


def test_no_other_weight_takes_the_address_of_the_one_that_was_packed() -> None:
    """To bfloat16 and back, the rounded weight may land where the first one lay, and has its version too."""
    layer = PackedLinear(32, 48)
    with torch.no_grad():
        layer(torch.ones(3, 32))
    address, layer = layer.weight.data_ptr(), layer.bfloat16()
    others = [torch.empty(48, 32) for _ in range(64)]
    assert address not in [other.data_ptr() for other in others]


def test_mixed_precision_is_for_the_plain_layer() -> None:
    layer, x_NI = PackedLinear(32, 48), torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x_NI).dtype == layer(layer(x_NI)[:, :32]).dtype == torch.bfloat16


def test_what_is_packed_is_neither_copied_nor_saved() -> None:
    layer = PackedLinear(32, 48)
    with torch.no_grad():
        expected = layer(torch.ones(2, 32))
        again = copy.deepcopy(layer)
        assert layer.state_dict().keys() == nn.Linear(32, 48).state_dict().keys()
        assert torch.equal(again(torch.ones(2, 32)), expected)


def test_a_model_is_left_alone_where_memory_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    memory = psutil.virtual_memory()._replace(available=2 * 32 * 48 * 4 - 1)
    monkeypatch.setattr(layers.psutil, "virtual_memory", lambda: memory)
    with pytest.warns(UserWarning, match="decoding is slower than it could be: 0.0 GiB of weights"):
        pack(model, [model])
    assert type(model[0]) is nn.Linear
    monkeypatch.setattr(layers.psutil, "virtual_memory", lambda: memory._replace(available=2 * 32 * 48 * 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(model, [model])
    assert type(model[0]) is PackedLinear


def test_layers_of_another_kind_are_left_alone() -> None:
    """An adapter or a quantized layer has a forward of its own."""

    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(Other(8, 8))
    pack(model, [model])
    assert type(model[0]) is Other


@torch.no_grad()
def test_rows_of_another_dtype_are_refused_in_pytorchs_words() -> None:
    """oneDNN says that it "could not create a primitive descriptor"."""
    with pytest.raises(RuntimeError, match="dtype"):
        PackedLinear(32, 48).bfloat16()(torch.randn(3, 32))
