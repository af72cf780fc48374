"""Trees, masks, paths and gathers, compared with drawings."""

import dataclasses
import math
from collections.abc import Callable

import torch

from coral_core.decoding import tree
from coral_core.decoding.cache import Slots
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.tree import judge
from coral_core.target.target import causal
from tests.tiny import ConfidentShape

T, F = True, False


def a_draft() -> tree.Draft:
    """
    root 50 ── 10 ── 30
         │     └──── 31
         └──── 20 ── 32 ── 40        rows: 0 root, 1 10, 2 20, 3 30, 4 31, 5 32, 6 40
    """
    parent_M = torch.tensor([0, 0, 0, 1, 1, 2, 5])
    return tree.Draft(
        token_M=torch.tensor([50, 10, 20, 30, 31, 32, 40]),
        parent_M=parent_M,
        depth_M=torch.tensor([0, 1, 1, 2, 2, 2, 3]),
        sees_MM=tree.ancestry(parent_M, 3),
        score_M=torch.zeros(7),
        levels=3,
    )


def test_a_row_sees_itself_and_its_ancestors() -> None:
    assert a_draft().sees_MM.tolist() == [
        [T, F, F, F, F, F, F],
        [T, T, F, F, F, F, F],
        [T, F, T, F, F, F, F],
        [T, T, F, T, F, F, F],
        [T, T, F, F, T, F, F],
        [T, F, T, F, F, T, F],
        [T, F, T, F, F, T, T],
    ]


def test_the_tree_mask_puts_committed_rows_before_the_branch() -> None:
    draft = a_draft()
    sees_MK = tree.sees(2, draft.depth_M[:4], draft.sees_MM[:4, :4], window=0)
    assert sees_MK.tolist() == [
        [T, T, T, F, F, F],
        [T, T, T, T, F, F],
        [T, T, T, F, T, F],
        [T, T, T, T, F, T],
    ]


def test_a_window_counts_positions_and_not_rows() -> None:
    """Three committed rows, window 3: the root (position 3) sees positions 1-3; depth 2 (position 5) sees 3-5."""
    draft = a_draft()
    sees_MK = tree.sees(3, draft.depth_M[:4], draft.sees_MM[:4, :4], window=3)
    assert sees_MK.tolist() == [
        [F, T, T, T, F, F, F],
        [F, F, T, T, T, F, F],
        [F, F, T, T, F, T, F],
        [F, F, F, T, T, F, T],
    ]


def test_the_causal_mask_of_a_chunk() -> None:
    assert causal(2, 2, 0, torch.device("cpu")).tolist() == [[T, T, T, F], [T, T, T, T]]
    assert causal(2, 2, 2, torch.device("cpu")).tolist() == [[F, T, T, F], [F, F, T, T]]


def test_the_path_follows_the_picks_while_they_were_drafted() -> None:
    #                                   root  10  20  30  31  32  40
    for picks, path, new in (
        ([20, 0, 32, 0, 0, 40, 99], [0, 2, 5, 6], [20, 32, 40, 99]),
        ([10, 31, 0, 0, 77, 0, 0], [0, 1, 4], [10, 31, 77]),
        ([10, 88, 0, 0, 0, 0, 0], [0, 1], [10, 88]),
        ([66, 30, 32, 0, 0, 40, 0], [0], [66]),  # deeper matches do not count under a root that turned away
    ):
        verdict = judge(a_draft(), torch.tensor(picks))
        assert verdict.path_A.tolist() == path
        assert verdict.new_A.tolist() == new
        assert verdict.accepted_drafts == len(path) - 1


def first(nodes: int) -> Callable[[torch.Tensor], int]:
    return TreeShape(depth=1, nodes=nodes, topk=1).count


ONE_ROW = tree.committed(1, 5, torch.empty(0))


def seen(beam: tree.Beam) -> list[list[bool]]:
    return (beam.sees_NK == 0).tolist()


def test_growing_two_levels_by_hand() -> None:
    """Width 2. Level 1: a -0.1, b -1. Level 2: a→c -0.2, a→d -3, b→e -0.1, b→f -2: the best are a→c and b→e.

    In the drafter's cache is one committed row; a and b take columns 1 and 2, c and e 3 and 4.
    """
    a, b, c, d, e, f = 1, 2, 3, 4, 5, 6
    beam = tree.first_level(torch.tensor([-0.1, -1.0]), torch.tensor([a, b]), width=2, sees_K=ONE_ROW)
    tree.give_columns(beam, torch.tensor([1, 2]))
    assert seen(beam) == [[T, T, F, F, F], [T, F, T, F, F]]
    beam = tree.extend(beam, torch.tensor([[-0.2, -3.0], [-0.1, -2.0]]), torch.tensor([[c, d], [e, f]]), width=2)
    assert beam.token_N.tolist() == [c, e]
    assert beam.row_N.tolist() == [0, 1]
    assert beam.pool_N.tolist() == [2, 4]
    tree.give_columns(beam, torch.tensor([3, 4]))
    assert seen(beam) == [[T, T, F, T, F], [T, F, T, F, T]]
    draft = tree.rerank(beam, torch.tensor([9]), count=first(3))
    assert draft.token_M.tolist() == [9, a, b, c]
    assert draft.parent_M.tolist() == [0, 0, 0, 1]
    assert draft.depth_M.tolist() == [0, 1, 1, 2]
    torch.testing.assert_close(draft.score_M, torch.tensor([0.0, -0.1, -1.0, -0.3]), rtol=0, atol=1e-6)


def test_unlikely_branches_are_cut() -> None:
    beam = tree.first_level(torch.tensor([-0.1, -1.0, -2.0]), torch.tensor([1, 2, 3]), 3, ONE_ROW)
    likely = ConfidentShape(depth=1, nodes=5, topk=3, confidence=math.exp(-1.5))
    beam = tree.narrow(beam, likely.width(beam.score_N))
    assert beam.token_N.tolist() == [1, 2]
    tree.give_columns(beam, torch.tensor([1, 2]))
    assert seen(beam) == [[T, T, F, F, F], [T, F, T, F, F]]
    assert tree.rerank(beam, torch.tensor([9]), count=likely.count).token_M.tolist() == [9, 1, 2]
    sure = dataclasses.replace(likely, confidence=math.exp(-0.05))
    nothing = tree.rerank(tree.narrow(beam, sure.width(beam.score_N)), torch.tensor([9]), count=sure.count)
    assert nothing.token_M.tolist() == [9]
    assert nothing.sees_MM.tolist() == [[T]]


def test_a_sure_child_never_ranks_before_its_parent() -> None:
    """Log-probability exactly 0 ties child and parent; a naive rerank keeps the child without its parent."""
    beam = tree.first_level(torch.tensor([-1.0, -1.0]), torch.tensor([1, 2]), 2, ONE_ROW)
    beam = tree.extend(beam, torch.tensor([[0.0], [0.0]]), torch.tensor([[3], [4]]), width=2)
    beam = tree.extend(beam, torch.tensor([[0.0], [0.0]]), torch.tensor([[5], [6]]), width=2)
    for nodes in range(1, 7):
        draft = tree.rerank(beam, torch.tensor([9]), count=first(nodes))
        rows = range(1, nodes + 1)
        assert all(draft.parent_M[row] < row for row in rows)
        assert all(draft.depth_M[draft.parent_M[row]] == draft.depth_M[row] - 1 for row in rows)


def test_the_cache_keeps_the_rows_of_the_path() -> None:
    slots = Slots(capacity=8)

    def rows(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)

    slots.update(rows(1, 2, 3), rows(1, 2, 3))
    slots.update(rows(4, 5, 6, 7), rows(4, 5, 6, 7))
    slots.keep(torch.tensor([0, 2]), start=3)
    keys, values = slots.update(rows(9), rows(9))
    assert keys.flatten().tolist() == values.flatten().tolist() == [1, 2, 3, 4, 6, 9]
    slots.truncate(2)
    assert slots.update(rows(8), rows(8))[0].flatten().tolist() == [1, 2, 8]
