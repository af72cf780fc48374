"""The Triton kernel behind `blocks.grouped_best`; imported only where it is used, since Triton is on few machines.

One program multiplies all rows of a route with one tile of one active group's rows, and keeps the tile's best, so that
the other logits never reach memory. Axes: N row, D hidden, V vocabulary in permuted order, G group, C candidate, R
place in a list (of active groups, or of a tile's best), X any axes: the active groups' tiles.
"""

import torch
import triton
import triton.language as tl

from coral_core.kernels.blocks import BEST

TILE_ROWS = 64
TILE_HIDDEN = 64


@triton.jit
def _tile_best(  # noqa: PLR0913 (a kernel's arguments are its pointers and sizes)
    hidden_ptr,
    rows_ptr,
    bias_ptr,
    start_ptr,
    chosen_ptr,
    value_ptr,
    row_ptr,
    hidden_rows,
    vocabulary,
    WIDTH: tl.constexpr,
    ACTIVE: tl.constexpr,
    TILES: tl.constexpr,
    ROUTE_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    tile, route = tl.program_id(0), tl.program_id(1)
    group = tl.load(chosen_ptr + route * ACTIVE + tile // TILES)
    first = tl.load(start_ptr + group) + (tile % TILES) * BLOCK_R
    end = tl.load(start_ptr + group + 1)
    place = tl.arange(0, BLOCK_R)
    row = (first + place).to(tl.int64)
    exists = row < end
    own = tl.arange(0, ROWS)
    n = route * ROUTE_ROWS + own
    wanted = (own < ROUTE_ROWS) & (n < hidden_rows)
    logits = tl.zeros((ROWS, BLOCK_R), dtype=tl.float32)
    for begin in range(0, WIDTH, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_ptr + n[:, None] * WIDTH + d[None, :], mask=wanted[:, None], other=0.0)
        weight = tl.load(rows_ptr + row[None, :] * WIDTH + d[:, None], mask=exists[None, :], other=0.0)
        logits += tl.dot(hidden, weight, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias_ptr + row, mask=exists, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(exists[None, :], logits, -float("inf"))
    slots = ACTIVE * TILES
    for kept in tl.static_range(KEEP):
        best = tl.argmax(logits, axis=1)
        out = (n * slots + tile) * KEEP + kept
        tl.store(value_ptr + out, tl.max(logits, axis=1), mask=wanted)
        tl.store(row_ptr + out, tl.minimum(first + best, vocabulary - 1).to(tl.int64), mask=wanted)
        logits = tl.where(place[None, :] == best[:, None], -float("inf"), logits)


def launch(
    hidden_ND: torch.Tensor,
    rows_VD: torch.Tensor,
    start_G: torch.Tensor,
    chosen_NR: torch.Tensor,
    bias_V: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N,C] and permuted rows [N,C] of each tile's best."""
    rows, (vocabulary, width) = hidden_ND.shape[0], rows_VD.shape
    routes, active = chosen_NR.shape
    tiles = triton.cdiv(-(-vocabulary // (start_G.numel() - 1)), TILE_ROWS)
    route_rows = rows if routes == 1 else 1
    device = hidden_ND.device
    value_NXR = torch.empty(rows, active * tiles, BEST, device=device)
    row_NXR = torch.empty(rows, active * tiles, BEST, dtype=torch.int64, device=device)
    _tile_best[(active * tiles, routes)](
        hidden_ND.contiguous(),
        rows_VD,
        rows_VD if bias_V is None else bias_V,
        start_G,
        chosen_NR.contiguous(),
        value_NXR,
        row_NXR,
        rows,
        vocabulary,
        WIDTH=width,
        ACTIVE=active,
        TILES=tiles,
        ROUTE_ROWS=route_rows,
        HAS_BIAS=bias_V is not None,
        ROWS=max(16, triton.next_power_of_2(route_rows)),
        BLOCK_R=TILE_ROWS,
        BLOCK_D=TILE_HIDDEN,
        KEEP=BEST,
    )
    return value_NXR.flatten(1), row_NXR.flatten(1)
