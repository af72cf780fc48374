"""What each row may attend to, as the additive masks that Hugging Face models take.

Axes: B batch: an answer each, T position of a new row, K cached column, M tree row, X any axes.
"""

import torch

from coral_core.target.target import Target

Mask = torch.Tensor | dict[str, torch.Tensor] | None


def causal(past: int, new: int, window: int, device: torch.device) -> torch.Tensor:
    """[T,K] true where a new row sees a cached or earlier row; a window of 0 is unbounded."""
    row_T1 = torch.arange(past, past + new, device=device)[:, None]
    column_K = torch.arange(past + new, device=device)
    sees_TK = column_K <= row_T1
    return sees_TK & (row_T1 - column_K < window) if window else sees_TK


def tree(past: int, depth_M: torch.Tensor, sees_MM: torch.Tensor, window: int) -> torch.Tensor:
    """[M,K] true where a tree row sees a committed row or its own branch.

    With a window, distance is counted in positions (past + depth), not in rows: siblings share a position.
    """
    position_M = depth_M + past
    position_K = torch.cat((torch.arange(past, device=depth_M.device), position_M))
    sees_MK = torch.cat((sees_MM.new_ones(depth_M.numel(), past), sees_MM), dim=1)
    return sees_MK & (position_M[:, None] - position_K < window) if window else sees_MK


def trees(
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


def for_batch(
    target: Target, past_B1: torch.Tensor, depth_BM: torch.Tensor, sees_BMM: torch.Tensor, columns: int
) -> Mask:
    """`trees` in the form the target takes."""
    return _by_type(target, lambda window: trees(past_B1, depth_BM, sees_BMM, columns, window))


def for_target(target: Target, past: int, depth_M: torch.Tensor, sees_MM: torch.Tensor) -> Mask:
    """The tree mask in the form the target takes: one tensor, or one per layer type where it mixes types."""
    if depth_M.numel() == 1:
        return for_rows(target, past, 1)
    return _by_type(target, lambda window: tree(past, depth_M, sees_MM, window))


def for_rows(target: Target, past: int, new: int) -> Mask:
    """The mask of plain rows appended to a cache; None where the model's own is the same and faster."""
    if target.window == 0 and (past == 0 or new == 1):
        return None
    return _by_type(target, lambda window: causal(past, new, window, target.device))


def _by_type(target: Target, build) -> Mask:  # type: ignore[no-untyped-def]
    masks = {
        kind: _additive(build(target.window if kind == "sliding_attention" else 0), target.dtype)
        for kind in target.layer_types
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(sees_XTK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where seen, the dtype's lowest number where not: [B,1,T,K], of one answer when it is given [T,K]."""
    lowest = torch.finfo(dtype).min
    mask_XTK = torch.zeros(sees_XTK.shape, dtype=dtype, device=sees_XTK.device).masked_fill_(~sees_XTK, lowest)
    return mask_XTK[None, None] if mask_XTK.dim() == 2 else mask_XTK[:, None]
