"""Acceptance: the target has picked one token at every tree row; follow the picks as long as they were drafted.

A pure function of ids, the same at every temperature (see sampling.py).
Axes: M tree row, root included; A path; P the same, filled up.
"""

import dataclasses
from collections.abc import Callable

import torch

from coral_core.decoding.tree import Draft


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
    path_P = rows - rank_M.topk(min(rows, draft.levels + 1)).values.clamp_min(1)
    new_P = picked_M[path_P]
    length, *new_ids = torch.cat((on_path_M.sum()[None], new_P)).tolist()
    return Verdict(path_P[:length], new_P[:length], new_ids[:length])


def walk(draft: Draft, step: Callable[[int], tuple[int, bool]]) -> Verdict:
    """`judge` for picks that must be made in order: `step` picks at a row, and says whether to go on."""
    edges = zip(draft.parent_M[1:].tolist(), draft.token_M[1:].tolist(), strict=True)
    child_of = {edge: row for row, edge in enumerate(edges, start=1)}
    path, new, going_on = [0], [], True
    while going_on:
        token, going_on = step(path[-1])
        new.append(token)
        child = child_of.get((path[-1], token))
        if child is None:
            break
        if going_on:
            path.append(child)
    device = draft.token_M.device
    return Verdict(torch.tensor(path, device=device), torch.tensor(new, device=device), new)
