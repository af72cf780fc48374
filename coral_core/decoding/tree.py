"""The draft tree: growing it level by level (EAGLE-2, arXiv 2406.16858), ranking its nodes, what they may attend to,
accepting a path of it.

Index code only: no forward, no cache. Row 0 is the root (the last token already chosen), drafted nodes follow, parents
before children. Acceptance is a pure function of ids, the same at every temperature (sampling.py): the target has
picked one token at every row, and the picks are followed as long as they were drafted.
Axes: B batch: an answer each, M tree row, N row: a node of the beam, or one that was chosen, C candidate node, R place
in a list of proposed tokens, K cached column (of the drafter, where drafts grow), A accepted node, X any axes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from coral_core.kernels.exact import Mask
from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True)
class Draft:
    """A drafted tree, root included as row 0."""

    token_M: torch.Tensor
    """Token ids; row 0 is the root."""
    parent_M: torch.Tensor
    """Row of each node's parent; the root's is 0."""
    depth_M: torch.Tensor
    """Levels below the root."""
    sees_MM: torch.Tensor
    """True where a row's node is the column's node or descends from it."""
    score_M: torch.Tensor
    """What the drafter gives each path: the sum of log-probabilities along it, 0 at the root."""
    levels: int
    """No row is deeper."""


@dataclasses.dataclass
class Beam:
    """The nodes of the newest level that will be expanded, and everything proposed so far."""

    token_N: torch.Tensor
    score_N: torch.Tensor
    pool_N: torch.Tensor
    """Place of each beam node in the pool of candidates."""
    row_N: torch.Tensor
    """The row of the level above that proposed it."""
    sees_NK: torch.Tensor
    """Additive: which of the drafter's rows each beam node sees, the committed ones and its ancestors' so far."""
    pool: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Per level: token, score, parent's place in the pool (-1 is the root), each [C]."""


def narrow(beam: Beam, width: int) -> Beam:
    """The beam's `width` best nodes; the best come first, so it is a cut."""
    return Beam(
        token_N=beam.token_N[:width],
        score_N=beam.score_N[:width],
        pool_N=beam.pool_N[:width],
        row_N=beam.row_N[:width],
        sees_NK=beam.sees_NK[:width],
        pool=beam.pool,
    )


def first_level(score_C: torch.Tensor, token_C: torch.Tensor, width: int, sees_K: torch.Tensor) -> Beam:
    """The first level: the root's candidates, best first; the `width` best are the beam, and see what `sees_K` says."""
    width = min(width, score_C.numel())
    parent_C = torch.full_like(token_C, -1)
    row_N = torch.arange(width, device=token_C.device)
    return Beam(
        token_N=token_C[:width],
        score_N=score_C[:width],
        pool_N=row_N,
        row_N=torch.zeros_like(row_N),
        sees_NK=sees_K.repeat(width, 1),
        pool=[(token_C, score_C, parent_C)],
    )


def give_columns(beam: Beam, column_N: torch.Tensor) -> None:
    """The beam's nodes get these columns of the drafter's cache. Each node sees its own from now on."""
    beam.sees_NK.scatter_(1, column_N[:, None], 0.0)


def extend(beam: Beam, logprob_NR: torch.Tensor, token_NR: torch.Tensor, width: int) -> Beam:
    """The next level: each beam node's proposals, scored by the sum of log-probabilities along the branch.

    No log-probability is above 0, or a child might outrank its parent.
    """
    proposals = logprob_NR.shape[1]
    score_C = (beam.score_N[:, None] + logprob_NR).flatten()
    parent_C = beam.pool_N.repeat_interleave(proposals)
    offset = sum(level[0].numel() for level in beam.pool)
    best_score_N, best_N = score_C.topk(min(width, score_C.numel()))
    row_N = best_N // proposals
    token_C = token_NR.flatten()
    return Beam(
        token_N=token_C[best_N],
        score_N=best_score_N,
        pool_N=offset + best_N,
        row_N=row_N,
        sees_NK=beam.sees_NK[row_N],
        pool=[*beam.pool, (token_C, score_C, parent_C)],
    )


def root_only(root_1: torch.Tensor) -> Draft:
    """A tree without drafted nodes: its verification is a plain step."""
    zero_1 = torch.zeros_like(root_1)
    return Draft(
        token_M=root_1,
        parent_M=zero_1,
        depth_M=zero_1,
        sees_MM=torch.ones_like(root_1, dtype=torch.bool)[None],
        score_M=torch.zeros_like(root_1, dtype=torch.float32),
        levels=0,
    )


def chain(root_1: torch.Tensor, ids: Sequence[int]) -> Draft:
    """A tree of one path: these tokens, each the child of the one before."""
    token_M = torch.cat((root_1, torch.tensor(ids, device=root_1.device, dtype=root_1.dtype)))
    depth_M = torch.arange(token_M.numel(), device=root_1.device)
    return Draft(
        token_M=token_M,
        parent_M=(depth_M - 1).clamp_min(0),
        depth_M=depth_M,
        sees_MM=depth_M[:, None] >= depth_M,
        score_M=torch.zeros_like(token_M, dtype=torch.float32),
        levels=len(ids),
    )


def rerank(beam: Beam, root_1: torch.Tensor, count: Callable[[torch.Tensor], int]) -> Draft:
    """Keep the best candidates of all levels; `count` says of their scores, best first, how many. There may be none.

    A child never outranks its parent: its score is at most its parent's, and on a tie (a log-probability of exactly
    0) the stable sort keeps the earlier, shallower one first.
    """
    token_C, score_C, parent_C = (torch.cat(parts) for parts in zip(*beam.pool, strict=True))
    ranked_C, order_C = score_C.sort(descending=True, stable=True)
    chosen_N = order_C[: count(ranked_C)].sort().values
    above_N = parent_C[chosen_N]
    parent_N = torch.where(above_N < 0, 0, torch.searchsorted(chosen_N, above_N) + 1)
    first_1 = token_C.new_zeros(1)
    parent_M = torch.cat((first_1, parent_N))
    sees_MM = ancestry(parent_M, len(beam.pool))
    return Draft(
        token_M=torch.cat((root_1, token_C[chosen_N])),
        parent_M=parent_M,
        depth_M=sees_MM.sum(1) - 1,
        sees_MM=sees_MM,
        score_M=torch.cat((score_C.new_zeros(1), score_C[chosen_N])),
        levels=len(beam.pool),
    )


def ancestry(parent_M: torch.Tensor, depth: int) -> torch.Tensor:
    """[M,M] true where the column is the row itself or one of its ancestors, in a tree of at most `depth` levels."""
    rows = parent_M.numel()
    sees_MM = torch.eye(rows, dtype=torch.bool, device=parent_M.device)
    above_M = parent_M
    for _ in range(depth):
        sees_MM.scatter_(1, above_M[:, None], True)
        above_M = parent_M[above_M]
    return sees_MM


NO_TOKEN = -1
"""The token of a row that only fills up a batch; it is never picked."""


def pad(drafts: Sequence[Draft], rows: int = 0) -> Draft:
    """The trees of several answers with an axis B in front, filled up with rows that see themselves alone.

    To the largest tree's rows, or to `rows` when that is more.
    """
    rows = max(rows, *(draft.token_M.numel() for draft in drafts))
    first = drafts[0]
    if all(draft.token_M.numel() == rows for draft in drafts):
        fields = ("token_M", "parent_M", "depth_M", "sees_MM", "score_M")
        stacked = {name: torch.stack([getattr(draft, name) for draft in drafts]) for name in fields}
        return Draft(**stacked, levels=max(draft.levels for draft in drafts))
    padded = Draft(
        token_M=first.token_M.new_full((len(drafts), rows), NO_TOKEN),
        parent_M=first.parent_M.new_zeros(len(drafts), rows),
        depth_M=first.depth_M.new_zeros(len(drafts), rows),
        sees_MM=torch.eye(rows, dtype=torch.bool, device=first.sees_MM.device).repeat(len(drafts), 1, 1),
        score_M=first.score_M.new_zeros(len(drafts), rows),
        levels=max(draft.levels for draft in drafts),
    )
    for number, draft in enumerate(drafts):
        own = draft.token_M.numel()
        padded.token_M[number, :own] = draft.token_M
        padded.parent_M[number, :own] = draft.parent_M
        padded.depth_M[number, :own] = draft.depth_M
        padded.sees_MM[number, :own, :own] = draft.sees_MM
        padded.score_M[number, :own] = draft.score_M
    return padded


def filled(draft: Draft, rows: int) -> Draft:
    """A tree filled up to so many rows, as in `pad`."""
    padded = pad([draft], rows)
    return Draft(
        token_M=padded.token_M[0],
        parent_M=padded.parent_M[0],
        depth_M=padded.depth_M[0],
        sees_MM=padded.sees_MM[0],
        score_M=padded.score_M[0],
        levels=draft.levels,
    )


# ---- what rows may attend to


def sees(past: int, depth_M: torch.Tensor, sees_MM: torch.Tensor, window: int) -> torch.Tensor:
    """[M,K] true where a tree row sees a committed row or its own branch.

    With a window, distance is counted in positions (past + depth), not in rows: siblings share a position.
    """
    position_M = depth_M + past
    position_K = torch.cat((torch.arange(past, device=depth_M.device), position_M))
    sees_MK = torch.cat((sees_MM.new_ones(depth_M.numel(), past), sees_MM), dim=1)
    return sees_MK & (position_M[:, None] - position_K < window) if window else sees_MK


def batch_sees(
    past_B1: torch.Tensor, depth_BM: torch.Tensor, sees_BMM: torch.Tensor, columns: int, window: int
) -> torch.Tensor:
    """[B,M,K] the same for a tree per answer, each behind its own committed rows; the columns between hold nothing."""
    column_K = torch.arange(columns, device=depth_BM.device)
    column_BM = past_B1 + torch.arange(depth_BM.shape[1], device=depth_BM.device)
    sees_BMK = (column_K < past_B1)[:, None].repeat(1, depth_BM.shape[1], 1)
    sees_BMK.scatter_(2, column_BM[:, None].expand_as(sees_BMM), sees_BMM)
    if not window:
        return sees_BMK
    position_BM = past_B1 + depth_BM
    position_BK = column_K.repeat(past_B1.shape[0], 1).scatter_(1, column_BM, position_BM)
    return sees_BMK & (position_BM[:, :, None] - position_BK[:, None] < window)


def committed(rows: int | torch.Tensor, columns: int, like_X: torch.Tensor) -> torch.Tensor:
    """[K] additive: a draft sees the committed rows, and of the columns behind them none yet."""
    column_K = torch.arange(columns, device=like_X.device)
    return like_X.new_zeros(columns).masked_fill_(column_K >= rows, -torch.inf)


def mask(target: Target, past: int, depth_M: torch.Tensor, sees_MM: torch.Tensor) -> Mask:
    """`sees` as the target takes it."""
    if depth_M.numel() == 1:
        return target.causal_mask(past, 1)
    return target.mask(lambda window: sees(past, depth_M, sees_MM, window))


def batch_mask(
    target: Target, past_B1: torch.Tensor, depth_BM: torch.Tensor, sees_BMM: torch.Tensor, columns: int
) -> Mask:
    """`batch_sees` as the target takes it."""
    return target.mask(lambda window: batch_sees(past_B1, depth_BM, sees_BMM, columns, window))


# ---- acceptance


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one verification decided."""

    path_A: torch.Tensor
    """Rows of the accepted path, root first: their features and cache rows are kept."""
    new_A: torch.Tensor
    """The target's picks along the path: the accepted drafts, then the bonus token."""
    new_ids: list[int]
    """The same, read from the device."""

    @property
    def accepted_drafts(self) -> int:
        """Drafted tokens that the target picked too; the bonus token is not counted."""
        return len(self.new_ids) - 1


def on_path(draft: Draft, picked_M: torch.Tensor) -> torch.Tensor:
    """[M] true for the rows on the accepted path, root included; with an axis B in front everywhere, for B trees.

    A node stands when the pick at its parent is its token, and all its ancestors stand. Siblings hold distinct
    tokens, so the standing nodes form one path, and the deepest of them ends it.
    """
    stands_M = picked_M.gather(-1, draft.parent_M) == draft.token_M
    stands_M[..., 0] = True
    whole_M = (stands_M[..., None, :] | ~draft.sees_MM).all(dim=-1)
    last_1 = (whole_M * (draft.depth_M + 1)).argmax(-1, keepdim=True)
    return draft.sees_MM.take_along_dim(last_1[..., None], dim=-2).squeeze(-2)


def judge(draft: Draft, picked_M: torch.Tensor) -> Verdict:
    """Walk from the root while the picked token is a drafted child. The host looks at the device once.

    For that, the path is sorted to the front of as many rows as it can have (`nonzero` would wait for its length).
    """
    rows = picked_M.numel()
    on_path_M = on_path(draft, picked_M)
    rank_M = on_path_M * torch.arange(rows, 0, -1, device=picked_M.device)
    path_A = rows - rank_M.topk(min(rows, draft.levels + 1)).values.clamp_min(1)
    new_A = picked_M[path_A]
    length, *new_ids = torch.cat((on_path_M.sum()[None], new_A)).tolist()
    return Verdict(path_A[:length], new_A[:length], new_ids[:length])


def walk(draft: Draft, pick: Callable[[int], tuple[int, bool]]) -> Verdict:
    """`judge` for picks that must be made in order: `pick` picks at a row, and says whether to go on."""
    edges = zip(draft.parent_M[1:].tolist(), draft.token_M[1:].tolist(), strict=True)
    child_of = {edge: row for row, edge in enumerate(edges, start=1)}
    path, new, going_on = [0], [], True
    while going_on:
        token, going_on = pick(path[-1])
        new.append(token)
        child = child_of.get((path[-1], token))
        if child is None:
            break
        if going_on:
            path.append(child)
    device = draft.token_M.device
    return Verdict(torch.tensor(path, device=device), torch.tensor(new, device=device), new)
