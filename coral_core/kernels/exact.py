"""Forwards on a CPU whose rows have the same bits whatever else is in the pass, and wherever its columns lie.

Products of one, of two or three, and of four and more rows round differently; so do activations at the end of what a
thread computes, which is less than a vector. A forward is therefore filled up with copies of its last row. Rows that
only fill up are not kept in the cache.

Drafted siblings lie between the columns of a path, and differ from draft to draft. So each row's scores are put into
the order of positions before its softmax, and put back behind it. The values are then added in blocks: the block of a
column is its position // BLOCK. The columns of a block are neighbours, siblings among them; a sibling's weight is
exactly 0, and a product that adds its terms one by one is not changed by a term of 0.

What this rests on was found on an AMD EPYC (AVX-512, MKL 2024.2; tests/kernels/test_exact.py). A batched product in
float32 of LEAST_ROWS rows and more, with at most WIDEST terms in a sum, adds them one by one. A score depends neither
on the other rows nor on the other columns, from LEAST_COLUMNS columns on. Where a batch has fewer products than there
are threads, several share a product, and all this holds for rows in multiples of LEAST_ROWS and columns in multiples of
LEAST_COLUMNS (2 to 32 threads). A softmax does not depend on hidden columns
behind the last one. With 16-bit products, and in PyTorch's own kernel (flash attention), none of this holds: keys and
values are given in float32, which holds 16-bit numbers exactly.
Axes: B batch, H attention head, J key/value head, T position (of a new row; the second T is that of what it sees), K
cached column, E head dimension, N row: the new rows of all heads that share keys, X any axes (batch and key/value head
as one).
"""

import dataclasses
import itertools
from typing import Any

import torch

BLOCK = 128
"""Positions of a block."""
WIDEST = 192
"""Columns of the widest block: those of BLOCK positions, and the siblings among them."""
MOST_NODES = WIDEST - BLOCK - 1
"""Of a tree besides its root, so that no block is wider."""
LEAST_ROWS, LEAST_COLUMNS = 4, 16
SMALL_PRODUCT = 400
"""Multiplications below which PyTorch multiplies by a loop of its own (LinearAlgebra.cpp, `bmm_out_or_baddbmm_`)."""
ROWS = 64
"""Rows that are attended to together in a long pass: their scores stay in the processor's cache."""

VECTOR = 64
"""Numbers that are computed together, at most."""
GRAIN = 1 << 15
"""Numbers for which PyTorch takes a further thread."""

_NOTHING = torch.empty(1)

Mask = torch.Tensor | dict[str, torch.Tensor] | None


@dataclasses.dataclass(frozen=True)
class Tree:
    """Where the new rows of trees lie, from the first column `start` on that is not at its own position."""

    start: int
    column_BTK: torch.Tensor
    """For each row the column that is at a position, both counted from `start`; any where it sees none."""
    position_BK: torch.Tensor
    """The position of each column, both counted from `start`."""
    sees_BTK: torch.Tensor
    """1.0 where the row sees the column, else 0.0."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The columns of a pass."""

    rows: int
    """New rows; further ones only fill up."""
    mask_BTK: torch.Tensor | None
    """Additive, in float32, over positions, as many as there are columns. None where all is seen, or where
    rows of one answer are causal."""
    ends_B: tuple[tuple[int, ...], ...]
    """For each answer the columns at which its blocks end, its own last one included. One for all of them where theirs
    end alike, as far as each one's columns go."""
    tree: Tree | None
    """None where every column is at its own position."""


def layout(position_BT: torch.Tensor, mask_B1TK: torch.Tensor | None) -> Layout:
    """Of new rows at these positions, the first of each answer right behind its committed columns.

    The mask is additive, over columns. Rows come level by level; the position of rows that only fill up a tree may be
    anything.
    """
    rows, past = position_BT.shape[1], position_BT[:, 0].tolist()
    mask_BTK = None if mask_B1TK is None else mask_B1TK[:, 0].float()
    last = max(past) + rows if mask_BTK is None else mask_BTK.shape[-1]
    step_BT = position_BT - position_BT[:, :1]
    if rows == 1 or mask_BTK is None or bool((step_BT == torch.arange(rows)).all()):
        return Layout(rows, mask_BTK, ((*range(BLOCK, last, BLOCK), last),), None)
    ends_B = tuple(ends(positions) for positions in position_BT.tolist())
    start, answers = min(past), len(past)
    column_BT = position_BT[:, :1] + torch.arange(rows)
    position_BK = torch.arange(last).repeat(answers, 1).scatter_(1, column_BT, position_BT)[:, start:] - start
    sees_BTK = (mask_BTK[:, :, start:] == 0).expand(answers, -1, -1)
    number_BTK = (torch.arange(1, last - start + 1) * sees_BTK).long()
    found_BTK = torch.zeros_like(number_BTK)
    found_BTK.scatter_reduce_(2, position_BK[:, None].expand_as(number_BTK), number_BTK, "amax")
    near_BTK = torch.zeros(found_BTK.shape).masked_fill_(found_BTK == 0, -torch.inf)
    mask_BTK = torch.cat((mask_BTK[:, :, :start].expand(answers, -1, -1), near_BTK), dim=2)
    longest = max(ends_B, key=lambda own: own[-1])
    if all(own[:-1] == tuple(end for end in longest if end < own[-1]) for own in ends_B):
        ends_B = (longest,)
    return Layout(rows, mask_BTK, ends_B, Tree(start, (found_BTK - 1).clamp_min_(0), position_BK, sees_BTK.float()))


def ends(positions: list[int]) -> tuple[int, ...]:
    """The columns at which blocks end, for new rows at these positions behind columns in their natural order.

    With blocks of 4 and rows at the positions 2 3 3 4 4 5, the blocks end at the columns 5 and 8:

        column    0 1 2 3 4 5 6 7
        position  0 1 2 3 3 4 4 5
    """
    past = positions[0]
    found = list(range(BLOCK, past + 1, BLOCK))
    for border in range((past // BLOCK + 1) * BLOCK, max(positions) + 1, BLOCK):
        found.append(past + next(row for row, position in enumerate(positions) if position >= border))
    return *found, past + len(positions)


def attention(
    query_BHTE: torch.Tensor,
    key_BJKE: torch.Tensor,
    value_BJKE: torch.Tensor,
    layout: Layout,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention [B,T,H,E] in the queries' dtype, over keys and values in float32; 0 in rows that only fill up."""
    batch, heads, filled, _ = query_BHTE.shape
    rows = layout.rows
    alone = rows == 1 and layout.mask_BTK is None  # what fills up is a copy of the row
    if alone or (rows == filled <= ROWS and layout.mask_BTK is not None):  # all at once, and no zeros to write
        out_BHTE = _some(query_BHTE, key_BJKE, value_BJKE, layout, scale)
        return out_BHTE.transpose(1, 2).to(query_BHTE.dtype).contiguous()  # some models view it
    out_BTHE = query_BHTE.new_zeros(batch, filled, heads, value_BJKE.shape[-1])
    for first in range(0, rows, ROWS):
        end = min(first + ROWS, rows)
        mask_BTK, seen = layout.mask_BTK, key_BJKE.shape[2]
        if mask_BTK is not None:
            mask_BTK = mask_BTK[:, first:end]
        elif rows > 1:
            seen += end - rows
            mask_BTK = torch.full((1, end - first, seen), -torch.inf).triu_(seen - (end - first) + 1)
        part = dataclasses.replace(layout, mask_BTK=mask_BTK, tree=_part(layout.tree, first, end))
        out_BHTE = _some(query_BHTE[:, :, first:end], key_BJKE[:, :, :seen], value_BJKE[:, :, :seen], part, scale)
        out_BTHE[:, first:end] = out_BHTE.transpose(1, 2)
    return out_BTHE


def _part(tree: Tree | None, first: int, end: int) -> Tree | None:
    """Some rows."""
    if tree is None:
        return None
    some = slice(first, end)
    return dataclasses.replace(tree, column_BTK=tree.column_BTK[:, some], sees_BTK=tree.sees_BTK[:, some])


def _some(
    query_BHTE: torch.Tensor, key_BJKE: torch.Tensor, value_BJKE: torch.Tensor, layout: Layout, scale: float | None
) -> torch.Tensor:
    """[B,H,T,E] of rows whose scores are held at once."""
    batch, heads, rows, width = query_BHTE.shape
    groups, columns = key_BJKE.shape[1:3]
    lines = heads // groups * rows
    scale = width**-0.5 if scale is None else scale
    query_XNE = query_BHTE.to(torch.float32, memory_format=torch.contiguous_format)
    query_XNE = query_XNE.reshape(batch * groups, lines, width)
    key_XKE, value_XKE = key_BJKE.flatten(0, 1), value_BJKE.flatten(0, 1)
    shared = torch.get_num_threads() > groups  # in a batch too, so that a row is computed as it is alone
    score_XNK = _scores(_filled(query_XNE, shared), key_XKE, scale, shared)
    if layout.mask_BTK is None and columns >= LEAST_COLUMNS:
        return _values(score_XNK.softmax(-1), value_XKE, layout, shared)[:, :lines].reshape(batch, heads, rows, -1)
    score_BHTK = score_XNK[:, :lines, :columns].reshape(batch, -1, rows, columns)
    tree = layout.tree
    if tree is not None:
        near_BHTK = score_BHTK[..., tree.start :]
        near_BHTK.copy_(near_BHTK.gather(3, _over_heads(tree.column_BTK, score_BHTK)))
    if layout.mask_BTK is not None:
        score_BHTK += layout.mask_BTK[:, None]
    weight_BHTK = _softmax(score_BHTK)
    if tree is not None:
        near_BHTK = weight_BHTK[..., tree.start :]
        moved_BHTK = near_BHTK.gather(3, _over_heads(tree.position_BK[:, None], score_BHTK))
        torch.mul(moved_BHTK, tree.sees_BTK[:, None], out=near_BHTK)
    weight_XNK = _filled(weight_BHTK.reshape(batch * groups, lines, columns), shared)
    return _values(weight_XNK, value_XKE, layout, shared)[:, :lines].reshape(batch, heads, rows, -1)


def _filled(x_XNX: torch.Tensor, shared: bool) -> torch.Tensor:
    """With rows of 0 up to LEAST_ROWS; where several threads share a product, up to a multiple of it."""
    lines = x_XNX.shape[1]
    more = -lines % LEAST_ROWS if shared else LEAST_ROWS - lines
    return torch.nn.functional.pad(x_XNX, (0, 0, 0, more)) if more > 0 else x_XNX


def _scores(query_XNE: torch.Tensor, key_XKE: torch.Tensor, scale: float, shared: bool) -> torch.Tensor:
    """[X,N,K], and further columns where there are fewer than LEAST_COLUMNS. Where several threads share a product, the
    last columns, which are not a multiple of them, are multiplied alone."""
    columns = key_XKE.shape[1]
    whole = columns - columns % LEAST_COLUMNS if shared or columns < LEAST_COLUMNS else columns
    if whole == columns:
        return _score(query_XNE, key_XKE, scale)
    filled_XKE = torch.nn.functional.pad(key_XKE[:, whole:], (0, 0, 0, LEAST_COLUMNS - (columns - whole)))
    last_XNK = _score(query_XNE, filled_XKE, scale)
    if whole == 0:
        return last_XNK
    return torch.cat((_score(query_XNE, key_XKE[:, :whole], scale), last_XNK[..., : columns - whole]), dim=2)


def _score(query_XNE: torch.Tensor, key_XKE: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(_NOTHING, query_XNE, key_XKE.transpose(1, 2), beta=0, alpha=scale)


def _softmax(score_XK: torch.Tensor) -> torch.Tensor:
    """Over the last axis. Fewer than LEAST_COLUMNS are added in another order, so that hidden ones are put behind."""
    columns = score_XK.shape[-1]
    if columns >= LEAST_COLUMNS:
        return score_XK.softmax(-1)
    hidden = (0, LEAST_COLUMNS - columns)
    return torch.nn.functional.pad(score_XK, hidden, value=-torch.inf).softmax(-1)[..., :columns]


def _over_heads(index_BTX: torch.Tensor, like_BHTK: torch.Tensor) -> torch.Tensor:
    """An index for every head and row."""
    return index_BTX[:, None].expand(-1, like_BHTK.shape[1], like_BHTK.shape[2], -1)


def _values(weight_XNK: torch.Tensor, value_XKE: torch.Tensor, layout: Layout, shared: bool) -> torch.Tensor:
    """[X,N,E]: the values, weighted and added block by block."""
    answers = layout.ends_B
    if len(answers) == 1:
        return _blocks(weight_XNK, value_XKE, answers[0], shared)
    each = zip(weight_XNK.chunk(len(answers)), value_XKE.chunk(len(answers)), answers, strict=True)
    # Not over the columns behind an answer's own: they would make its last block wider than WIDEST.
    return torch.cat([_blocks(weight[..., : own[-1]], value[:, : own[-1]], own, shared) for weight, value, own in each])


def _blocks(weight_XNK: torch.Tensor, value_XKE: torch.Tensor, ends: tuple[int, ...], shared: bool) -> torch.Tensor:
    columns = weight_XNK.shape[2]
    ends = (*(end for end in ends if end < columns), columns)
    out_XNE = torch.bmm(*_terms(weight_XNK, value_XKE, 0, ends[0], shared))
    for start, end in itertools.pairwise(ends):
        out_XNE.baddbmm_(*_terms(weight_XNK, value_XKE, start, end, shared))
    return out_XNE


def _terms(
    weight_XNK: torch.Tensor, value_XKE: torch.Tensor, start: int, end: int, shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's weights and values; with columns of 0 behind them where there are so few that they would be multiplied
    by a loop of PyTorch's own, or that threads which share a product add them in another way."""
    weight_XNK, value_XKE = weight_XNK[:, :, start:end], value_XKE[:, start:end]
    more = LEAST_COLUMNS - (end - start)
    small = weight_XNK[0].numel() * value_XKE.shape[2] < SMALL_PRODUCT
    if more <= 0 or not (small or shared):
        return weight_XNK, value_XKE
    return torch.nn.functional.pad(weight_XNK, (0, more)), torch.nn.functional.pad(value_XKE, (0, 0, 0, more))


def filled_rows(rows: int, batch: int, width: int, threads: int, packed: bool) -> int:
    """The number of rows of each of a batch's answers, such that no thread computes a part of a vector.

    `width` is that of the activations. Counts that are multiples of few vectors need no filling:

        1 row of 1,536 → 4,   9 of 4,864 → 9,   9 of 48 → 12

    Weights that are not packed are multiplied as keys are: threads that share the product want LEAST_ROWS rows each.
    """
    multiple = 1 if packed or threads == 1 else LEAST_ROWS
    while not (_whole(rows * batch, width, threads) and rows * batch % multiple == 0):
        rows += 1
    return rows


def _whole(rows: int, width: int, threads: int) -> bool:
    numbers = rows * width
    part = -(-numbers // min(threads, -(-numbers // GRAIN)))
    return rows >= LEAST_ROWS and part % VECTOR == 0


class Filled:
    """A cache for one forward: it keeps the first rows, in float32, and not those that fill up."""

    def __init__(self, cache: Any, rows: int) -> None:
        self._cache, self._rows = cache, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __len__(self) -> int:
        return len(self._cache)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the cache's own."""
        key_BJTE, value_BJTE = key_states[:, :, : self._rows], value_states[:, :, : self._rows]
        rows: tuple[torch.Tensor, torch.Tensor] = self._cache.update(
            key_BJTE.float(), value_BJTE.float(), *args, **kwargs
        )
        return rows


def masks(position_BT: torch.Tensor, mask: Mask, kinds: tuple[str, ...]) -> Mask:
    """In the place of each mask one that carries its layout to the layers; they do not read it otherwise."""
    if isinstance(mask, dict):
        return {kind: _carrier(position_BT, own) for kind, own in mask.items()}
    carrier = _carrier(position_BT, mask)
    return dict.fromkeys(kinds, carrier) if len(kinds) > 1 else carrier


def _carrier(position_BT: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    carrier = torch.zeros(1, 1, 1, 1)
    carrier.columns = layout(position_BT, mask)  # type: ignore[attr-defined]
    return carrier
