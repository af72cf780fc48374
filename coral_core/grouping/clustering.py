"""Orders of the vocabulary that put tokens which are likely together into the same group.

k-means finds the centres (scikit-learn); the balance, which a contiguous block of fixed size needs, is ours: prices
that even out the demand for each group (Sinkhorn's iterations), then an exact fill of each group's room.
Not for choosing groups while decoding: that is the router's.
Axes: V vocabulary, D hidden, G group, N row: a feature, R place in a list of the most likely tokens.
"""

import dataclasses

import torch
from sklearn.cluster import MiniBatchKMeans
from torch.nn.functional import normalize

from coral_core.head.groups import Groups, balanced_sizes, check_groups
from coral_core.progress import Progress, silent

_BATCH = 4096
"""Head rows per k-means step."""
_STEPS = 60
"""k-means steps; on pico and on 128k x 4,096 rows the centres stand still well before."""
_ROUNDS = 8
"""Balanced assignments, each followed by new centres."""
_DOUBT = 3.0
"""Probability mass, in tokens, at which what was seen of a token counts as much as its head row; on pico 0.3, 1, 3 and
10 kept 98.9, 99.3, 99.5 and 98.6 % of what the drafter gets right, at 8 of 64 groups."""
_LEAST_WISH = -60.0
"""The least logarithm of a wish, beside a row's greatest: float32 holds its exponential and its inverse."""


def frequency_order(count_V: torch.Tensor) -> torch.Tensor:
    """Token ids [V], the most frequent first; ties by id."""
    return count_V.argsort(descending=True, stable=True)


def by_kmeans(
    rows_VD: torch.Tensor, groups: int, *, count_V: torch.Tensor, seed: int = 0, progress: Progress = silent
) -> Groups:
    """Balanced k-means on normalised rows. Groups, and tokens within them, come in order of `count_V`.

    Groups that are often active are so neighbours, and neighbours are multiplied together.
    Raises RecipeError when there are more groups than rows.
    """
    unit_VD = normalize(rows_VD.detach().to("cpu", torch.float32), dim=1)
    return balanced(unit_VD, groups, count_V=count_V, seed=seed, progress=progress)


def balanced(
    unit_VD: torch.Tensor, groups: int, *, count_V: torch.Tensor, seed: int = 0, progress: Progress = silent
) -> Groups:
    """`by_kmeans` on rows that are normalised. Raises RecipeError when there are more groups than rows."""
    check_groups(groups, unit_VD.shape[0])
    size_G = balanced_sizes(unit_VD.shape[0], groups)
    centre_GD = _centres(unit_VD, groups, seed, progress)
    group_V = torch.zeros(len(unit_VD), dtype=torch.int64)
    for done in range(_ROUNDS):
        progress("balance groups", done, _ROUNDS, {})
        before_V, group_V = group_V, balanced_assignment(unit_VD @ centre_GD.T, size_G)
        if torch.equal(before_V, group_V):
            break
        sum_GD = torch.zeros_like(centre_GD).index_add_(0, group_V, unit_VD)
        centre_GD = normalize(sum_GD, dim=1)
    progress("balance groups", _ROUNDS, _ROUNDS, {})
    return _sorted_groups(group_V, count_V, groups)


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Where each token stands among the target's most likely ones: what `token_contexts` sums over features."""

    feature_VD: torch.Tensor
    """Σ p · (feature - mean feature), over the features whose top-k holds the token."""
    mass_V: torch.Tensor
    """Σ p over the same."""


def token_contexts(
    vocabulary: int, feature_ND: torch.Tensor, prob_NR: torch.Tensor, token_NR: torch.Tensor
) -> Contexts:
    """Contexts from features, and the target's top-k probabilities and tokens after each."""
    centred_ND = feature_ND.float() - feature_ND.float().mean(0)
    sum_VD = centred_ND.new_zeros(vocabulary, feature_ND.shape[1])
    for prob_N, token_N in zip(prob_NR.unbind(1), token_NR.unbind(1), strict=True):
        sum_VD.index_add_(0, token_N, prob_N[:, None] * centred_ND)
    return Contexts(sum_VD, prob_NR.new_zeros(vocabulary).index_add_(0, token_NR.flatten(), prob_NR.flatten()))


def cooccurrence_rows(rows_VD: torch.Tensor, contexts: Contexts) -> torch.Tensor:
    """The features [V,D], normalised, after which the target thinks of a token: those of one top-k come together.

    A token that the data shows little falls back on its head row, which points the way its features would. `contexts`
    is overwritten: such matrices have gigabytes, and one more is made here.
    """
    rows_VD = rows_VD.detach().to("cpu", torch.float32)
    seen_V1 = (contexts.mass_V / (contexts.mass_V + _DOUBT)).cpu()[:, None]
    mixed_VD = rows_VD - rows_VD.mean(0)
    del rows_VD  # a copy where the head has 16 bits
    normalize(mixed_VD, dim=1, out=mixed_VD)
    context_VD = contexts.feature_VD.cpu()
    mixed_VD.lerp_(normalize(context_VD, dim=1, out=context_VD), seen_V1)
    return normalize(mixed_VD, dim=1, out=mixed_VD)


def _centres(unit_VD: torch.Tensor, groups: int, seed: int, progress: Progress) -> torch.Tensor:
    model = MiniBatchKMeans(groups, random_state=seed % (1 << 32), batch_size=_BATCH, n_init=1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(_STEPS):
        progress("cluster the head", step, _STEPS, {})
        some_V = torch.randperm(len(unit_VD), generator=generator)[: max(_BATCH, groups)]
        model.partial_fit(unit_VD[some_V].numpy())
    progress("cluster the head", _STEPS, _STEPS, {})
    return normalize(torch.from_numpy(model.cluster_centers_).float(), dim=1)


def balanced_assignment(score_VG: torch.Tensor, size_G: torch.Tensor, *, rounds: int = 40) -> torch.Tensor:
    """The group of each row [V], group g taking exactly size_G[g] rows, with a high total score.

    Sinkhorn's prices make groups equally wanted; then rows go to their best group with room, each group taking those
    that want it most, until all are placed. Not the optimum (an assignment problem), which is cubic in V.
    """
    sharp_VG = score_VG / (0.1 * score_VG.std().clamp_min(1e-6))
    # Factors in place of prices: 40 rounds over 262,144 rows and 256 groups take 6 s of a core, with logarithms 49.
    wish_VG = (sharp_VG - sharp_VG.amax(dim=1, keepdim=True)).clamp_min_(_LEAST_WISH).exp_()
    share_G = size_G.to(score_VG.dtype)
    factor_G = torch.ones_like(share_G)
    for _ in range(rounds):
        factor_G = share_G / ((1 / (wish_VG @ factor_G)) @ wish_VG)
    wish_VG = torch.add(sharp_VG, factor_G.log(), out=wish_VG)
    room_G = size_G.clone()
    group_V = torch.full((len(score_VG),), -1)
    while (left_V := (group_V < 0).nonzero()[:, 0]).numel():
        want_V = wish_VG[left_V].masked_fill(room_G == 0, -torch.inf)
        best_V, choice_V = want_V.max(dim=1)
        for group in choice_V.unique().tolist():
            here_V = (choice_V == group).nonzero()[:, 0]
            taken_V = here_V[best_V[here_V].argsort(descending=True, stable=True)[: int(room_G[group])]]
            group_V[left_V[taken_V]] = group
            room_G[group] -= len(taken_V)
    return group_V


def _sorted_groups(group_V: torch.Tensor, count_V: torch.Tensor, groups: int) -> Groups:
    """Groups by falling mean count (larger groups first where sizes differ), tokens within by falling count."""
    size_G = torch.bincount(group_V, minlength=groups)
    mass_G = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_V, count_V.to("cpu", torch.float64))
    rank_G = mass_G.argsort(descending=True, stable=True)
    rank_G = rank_G[size_G[rank_G].argsort(descending=True, stable=True)]
    place_G = torch.empty_like(rank_G)
    place_G[rank_G] = torch.arange(groups)
    order_V = frequency_order(count_V.cpu())
    order_V = order_V[place_G[group_V[order_V]].argsort(stable=True)]
    return Groups.from_order(order_V, groups)
