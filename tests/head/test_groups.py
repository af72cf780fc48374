"""Groups as drawings: balanced, contiguous after the permutation, and never a lost token."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coral_core.errors import RecipeError
from coral_core.grouping.clustering import (
    Contexts,
    balanced,
    balanced_assignment,
    by_kmeans,
    cooccurrence_rows,
    frequency_order,
    token_contexts,
)
from coral_core.head.groups import Groups, balanced_sizes
from coral_core.kernels.blocks import runs


def test_the_permutation_of_the_docstring() -> None:
    groups = Groups.from_order(torch.tensor([4, 0, 2, 5, 1, 3]), 4)
    assert groups.token_GR.tolist() == [[4, 0], [2, 5], [1, -1], [3, -1]]
    assert groups.start_G == [0, 2, 4, 5, 6]
    assert groups.order_V.tolist() == [4, 0, 2, 5, 1, 3]
    assert groups.group_V.tolist() == [0, 2, 1, 3, 0, 1]


def test_neighbouring_groups_are_read_in_one_run() -> None:
    start_G = [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert runs([7, 2, 3], start_G) == [(20, 40), (70, 80)]
    assert runs(range(8), start_G) == [(0, 80)]


@pytest.mark.parametrize("vocabulary, groups", [(12, 4), (13, 4), (97, 8), (5, 5), (6, 1)])
def test_every_clustering_is_balanced_and_loses_no_token(vocabulary: int, groups: int) -> None:
    rows_VD = torch.randn(vocabulary, 6, generator=torch.Generator().manual_seed(0))
    count_V = torch.arange(vocabulary) % 7
    contexts = token_contexts(vocabulary, rows_VD, torch.ones(vocabulary, 1), torch.arange(vocabulary)[:, None] // 2)
    for made in (
        by_kmeans(rows_VD, groups, count_V=count_V),
        balanced(cooccurrence_rows(rows_VD, contexts), groups, count_V=count_V),
    ):
        assert made.is_whole(vocabulary)
        sizes = (made.token_GR >= 0).sum(1)
        assert sizes.max() - sizes.min() <= 1


def test_frequency_puts_the_most_frequent_first_and_ties_by_id() -> None:
    assert frequency_order(torch.tensor([1, 5, 0, 5])).tolist() == [1, 3, 0, 2]


def test_kmeans_finds_the_clusters_that_are_there() -> None:
    """Three bundles of four rows each, shuffled: every group is one bundle."""
    direction = torch.eye(3).repeat(4, 1)
    rows_VD = direction + 0.05 * torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    group_V = by_kmeans(rows_VD, 3, count_V=torch.ones(12)).group_V
    far = by_kmeans(rows_VD, 3, count_V=torch.ones(12), seed=1 << 32)  # more bits than scikit-learn takes
    assert far.is_whole(12)
    assert [len(set(group_V[bundle::3].tolist())) for bundle in range(3)] == [1, 1, 1]


def test_contexts_by_hand() -> None:
    """Two features, mean 0: token 1 follows both, the second time for sure."""
    feature_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    contexts = token_contexts(3, feature_ND, torch.tensor([[0.75, 0.25], [1.0, 0.0]]), torch.tensor([[0, 1], [1, 2]]))
    assert contexts.mass_V.tolist() == [0.75, 1.25, 0.0]
    assert contexts.feature_VD.tolist() == [[0.75, 0.0], [-0.75, 0.0], [0.0, 0.0]]


def test_cooccurrence_finds_what_the_rows_do_not_show() -> None:
    """Random head rows; tokens t, t + 3, t + 6, t + 9 are likely together. The rows alone put them elsewhere."""
    generator = torch.Generator().manual_seed(2)
    rows_VD = torch.randn(12, 6, generator=generator)
    kind_N = torch.arange(300) % 3
    feature_ND = 3 * torch.eye(6)[kind_N] + 0.1 * torch.randn(300, 6, generator=generator)
    token_NR = kind_N[:, None] + torch.tensor([0, 3, 6, 9])
    contexts = token_contexts(12, feature_ND, torch.full((300, 4), 0.25), token_NR)

    def bundles(groups: Groups) -> list[int]:
        return [len(set(groups.group_V[bundle::3].tolist())) for bundle in range(3)]

    assert bundles(balanced(cooccurrence_rows(rows_VD, contexts), 3, count_V=torch.ones(12))) == [1, 1, 1]
    assert bundles(by_kmeans(rows_VD, 3, count_V=torch.ones(12))) != [1, 1, 1]


class Matrices(TorchDispatchMode):
    """Counts the matrices that are made, of so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.known, self.held, self.made = numbers, set[int](), [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = [x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= 4 * self.numbers:
            self.made += out.untyped_storage().data_ptr() not in {*old, *self.known}
            self.known.add(out.untyped_storage().data_ptr())
            self.held.append(out)  # so that no other one comes to lie there
        return out


def test_what_is_clustered_takes_one_matrix_more_and_has_the_same_bits() -> None:
    generator, normalize = torch.Generator().manual_seed(0), torch.nn.functional.normalize
    rows_VD = torch.randn(97, 20, generator=generator)
    contexts = Contexts(torch.randn(97, 20, generator=generator), 9 * torch.rand(97, generator=generator))
    own_VD, seen_VD = normalize(rows_VD - rows_VD.mean(0), dim=1), normalize(contexts.feature_VD, dim=1)
    expected_VD = normalize(torch.lerp(own_VD, seen_VD, (contexts.mass_V / (contexts.mass_V + 3))[:, None]), dim=1)
    before_VD = rows_VD.clone()
    with Matrices(97 * 20) as count:
        found_VD = cooccurrence_rows(rows_VD, contexts)
    assert torch.equal(found_VD, expected_VD) and torch.equal(rows_VD, before_VD)
    assert count.made == 1


def test_balance_moves_the_rows_that_mind_least() -> None:
    """All four rows prefer group 0, which has room for two: the two that want it most stay."""
    score_VG = torch.tensor([[1.0, 0.0], [1.0, 0.9], [1.0, 0.1], [1.0, 0.8]])
    assert balanced_assignment(score_VG, balanced_sizes(4, 2)).tolist() == [0, 1, 0, 1]


def test_more_groups_than_tokens_are_refused() -> None:
    with pytest.raises(RecipeError, match="head.groups is 9, but the vocabulary has 8 tokens"):
        Groups.from_order(torch.arange(8), 9)


def test_a_damaged_permutation_is_noticed() -> None:
    assert not Groups(torch.tensor([[0, 1], [1, 2]])).is_whole(4)
    assert not Groups(torch.tensor([[-1, 1], [0, 2]])).is_whole(3)
