"""The target's cache: layers that look alike share one block, others do not, and nobody can tell."""

import pytest
import torch

from coral_core.decoding.cache import SlotCache

LAYERS, HEADS = 3, 2


def rows(layer: int, values: list[int], width: int = 1) -> torch.Tensor:
    """[1,G,T,E]: each row holds its value, plus 100 for each layer, negative in the second head."""
    row_T = torch.tensor(values, dtype=torch.float32) + 100 * layer
    return torch.stack((row_T, -row_T))[None, :, :, None].expand(1, HEADS, len(values), width)


def append(cache: SlotCache, values: list[int], widths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        cache.update(rows(layer, values, width), rows(layer, values, width) + 0.5, layer)
        for layer, width in enumerate(widths)
    ]


@pytest.mark.parametrize("widths", [(1, 1, 1), (1, 1, 4)], ids=["alike", "one layer is wider"])
def test_a_path_is_kept_in_every_layer(widths: tuple[int, ...]) -> None:
    cache = SlotCache(LAYERS, 6)
    append(cache, [1, 2], widths)
    append(cache, [3, 4, 5, 6], widths)
    cache.keep(torch.tensor([0, 2]), 2)
    assert cache.length == 4
    cache.truncate(3)
    cache.reserve(9)
    for layer, (keys, values) in enumerate(append(cache, [7, 8, 9, 10], widths)):
        expected = rows(layer, [1, 2, 3, 7, 8, 9, 10], widths[layer])
        assert torch.equal(keys, expected)
        assert torch.equal(values, expected + 0.5)
    assert {layer.capacity for layer in cache.layers} == {9}
    assert (cache._block_LBJKE is not None) == (len(set(widths)) == 1)


def test_room_may_be_made_before_every_layer_has_rows() -> None:
    """As when Ctrl-C ends the first forward pass in the middle of a layer."""
    cache = SlotCache(LAYERS, 2)
    cache.update(rows(0, [1, 2]), rows(0, [1, 2]), 0)
    cache.truncate(0)
    cache.reserve(4)
    for layer, (keys, _) in enumerate(append(cache, [3, 4, 5, 6], (1, 1, 1))):
        assert torch.equal(keys, rows(layer, [3, 4, 5, 6]))
