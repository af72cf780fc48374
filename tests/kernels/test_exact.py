"""Attention at real models' widths, where other kernels serve than for tiny ones: the same bits in a tree and alone."""

import random

import pytest
import torch

from coral_core.decoding import tree
from coral_core.kernels import exact

WIDTHS = {
    "SmolLM2": (9, 3, 64),
    "Qwen2.5": (14, 2, 64),
    "Llama 3": (32, 8, 128),
    "Phi-3": (32, 32, 96),
    "Gemma 3": (4, 1, 256),
    "one key head, five query heads": (5, 1, 40),
}
PATH = 6


def test_blocks_end_where_positions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK", 4)
    assert exact.ends([2, 3, 3, 4, 4, 5]) == (5, 8)
    assert exact.ends([4, 5]) == (4, 6)
    assert exact.ends([7, 8, 8, 9]) == (4, 8, 11)


@pytest.mark.parametrize("past", [9, 120, 125, 250, 600])
@pytest.mark.parametrize("threads", [1, 2, 16], indirect=True)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_a_path_has_the_same_bits_among_siblings_and_alone(
    widths: tuple[int, int, int], threads: None, past: int
) -> None:
    """Behind 120, 125 and 250 columns the tree's positions lie in two blocks."""
    heads, groups, width = widths
    torch.manual_seed(past)
    draw = random.Random(past)
    query_BHTE, key_BJKE = torch.randn(1, heads, PATH, width), torch.randn(1, groups, past + PATH, width)
    value_BJKE = torch.randn(1, groups, past + PATH, width)
    rows, parents, above = [0], [0], 0
    for _ in range(PATH - 1):
        first, siblings = len(parents), draw.randrange(1, 10)
        parents += [above] * siblings
        above = first + draw.randrange(siblings)
        rows.append(above)
    sees_MM = tree.ancestry(torch.tensor(parents), PATH)
    depth_M, count = sees_MM.sum(1) - 1, len(parents)
    mask_MK = torch.zeros(count, past + count).masked_fill_(~tree.sees(past, depth_M, sees_MM, 0), -torch.inf)
    query_BHME = torch.randn(1, heads, count, width)
    tree_key_BJKE, tree_value_BJKE = torch.randn(2, 1, groups, past + count, width)
    query_BHME[:, :, rows] = query_BHTE
    column = [*range(past), *(past + row for row in rows)]
    tree_key_BJKE[:, :, column], tree_value_BJKE[:, :, column] = key_BJKE, value_BJKE
    layout = exact.layout((past + depth_M)[None], mask_MK[None, None])
    together = exact.attention(query_BHME, tree_key_BJKE, tree_value_BJKE, layout)
    for level, row in enumerate(rows):
        seen, one = past + level + 1, exact.layout(torch.tensor([[past + level]]), None)
        query = query_BHTE[:, :, level : level + 1]
        alone = exact.attention(query, key_BJKE[:, :, :seen], value_BJKE[:, :, :seen], one)
        assert torch.equal(alone[0, 0], together[0, row])
        assert alone.is_contiguous(), "JetMoe takes a view of it"
    whole = torch.nn.functional.scaled_dot_product_attention(
        query_BHME, tree_key_BJKE, tree_value_BJKE, attn_mask=mask_MK, enable_gqa=True
    )
    torch.testing.assert_close(together, whole.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pasts", [(100, 300), (120, 124), (120, 124, 240), (240, 60, 600)], ids=str)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_a_tree_has_the_same_bits_beside_other_answers_and_alone(threads: None, pasts: tuple[int, ...]) -> None:
    """Whichever blocks the others' columns lie in: a tree behind 100 columns reaches beyond the 128th, and its
    positions do not; behind 120 and 124 one has two blocks and the other one."""
    heads, groups, width = WIDTHS["SmolLM2"]
    torch.manual_seed(len(pasts))
    draw, count, last = random.Random(1), 37, max(pasts) + 37
    query_BHME = torch.randn(len(pasts), heads, count, width)
    key_BJKE, value_BJKE = torch.randn(2, len(pasts), groups, last, width)
    mask_BMK, position_BM = torch.full((len(pasts), count, last), -torch.inf), []
    for past, mask_MK in zip(pasts, mask_BMK, strict=True):
        parents = [0, *sorted(draw.randrange(row) for row in range(1, count))]
        sees_MM = tree.ancestry(torch.tensor(parents), count)
        depth_M = sees_MM.sum(1) - 1
        mask_MK[:, : past + count].masked_fill_(tree.sees(past, depth_M, sees_MM, 0), 0.0)
        position_BM.append(past + depth_M)
    layout = exact.layout(torch.stack(position_BM), mask_BMK[:, None])
    together = exact.attention(query_BHME, key_BJKE, value_BJKE, layout)
    for answer, (past, position_M) in enumerate(zip(pasts, position_BM, strict=True)):
        own, end = slice(answer, answer + 1), past + count
        alone = exact.attention(
            query_BHME[own],
            key_BJKE[own, :, :end],
            value_BJKE[own, :, :end],
            exact.layout(position_M[None], mask_BMK[own, None, :, :end]),
        )
        assert torch.equal(alone[0], together[answer]), f"the answer behind {past} columns"
