"""What a target must do for its rows to be drafted, tried out on a few tokens when it is loaded.

A round reads rows that no plain step would have read together: siblings of one position, and positions that will be
taken back. So a row must depend on its token, its position and the rows that its mask shows it, and on no others. What
a config says is not believed: each property is seen in the model's own numbers.
Axes: B batch, T position of a row, K cached column, D hidden, V vocabulary, X any axes.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from coral_core.errors import TargetError, first_line
from coral_core.target.target import Target

SPREAD = (0, 1, 5, 17, 31)
"""Positions of the rows that must not change with the furthest one; by the last, rotary factors that differ show."""
FAR = 1 << 20
"""The furthest position that is tried, where the context has no end."""
LONG_WINDOW = 512
"""A longer window is tried in small: 4,096 rows of a 7B model would take a processor minutes."""
SMALL_WINDOW = 3
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of a feature's length: far above rounding, far below what another row or another position changes. In 16 bits,
rounding alone may exceed it where forwards are not exact: see `_alike`."""
NOISE = 3.0
"""What differs by so many times as much as rounding was seen to change is no rounding."""


@torch.no_grad()
def probed(target: Target) -> Target:
    """The target, its context shortened to where its rows are independent of each other.

    Raises TargetError for a model whose rows cannot be drafted, in one line that says why.
    """
    name = type(target.model).__name__
    try:
        _refuse_uncached(target, name)
        _compare_logits(target, name)
        if target.window:
            _compare_window(target, name)
        _compare_tree(target, name)
        return _bounded(target)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise TargetError(
            f"{name} cannot be read with coral's masks, positions and cache ({first_line(error)}). "
            "Choose another target.model"
        ) from error


def _refuse_uncached(target: Target, name: str) -> None:
    parameters = inspect.signature(target.model.base_model.forward).parameters
    if not {"cache", "past_key_values"} & set(parameters):
        raise TargetError(f"{name} takes no cache, so every token would read all of them. Choose another target.model")


def _compare_logits(target: Target, name: str) -> None:
    """Head(feature) is what the model itself answers."""
    ids_BT = _ids(target, 4)
    own_BTV = target.model(input_ids=ids_BT, use_cache=False).logits.float()
    ours_BTV = target.logits(target.forward(ids_BT)).float()
    if not own_BTV.isfinite().all():
        raise TargetError(
            f"{name} answers with numbers that are infinite or none in {target.dtype}: its weights are damaged, or "
            "need another dtype. Restore its files, or set target.dtype=float32"
        )
    gap = float((own_BTV - ours_BTV).abs().max())
    if not gap <= 1e-2 * max(1.0, float(own_BTV.abs().max())):
        raise TargetError(
            f"{name}: its LM head on its last hidden state misses its own logits by {gap:.3g}; "
            "it transforms them in a way coral does not know. Choose another target.model"
        )


def _compare_window(target: Target, name: str) -> None:
    """The window that the config names is the one that the model's own mask applies.

    A long window is made small for the comparison; where that shows a difference, the layers may keep the window
    elsewhere too, and only as many rows as it has tell.
    """
    small = target.window > LONG_WINDOW
    with _windowed(target, SMALL_WINDOW if small else target.window) as tried:
        equal = _applies(tried)
    if not equal and not (small and _applies(target)):
        raise TargetError(
            f"{name}: its config names a window of {target.window} positions, which its own attention does not apply. "
            "Choose another target.model"
        )


def _applies(target: Target) -> bool:
    ids_BT = _ids(target, target.window + 4)
    own_BTD = target.forward(ids_BT)
    position_T = torch.arange(ids_BT.shape[1], device=target.device)
    ours_BTD = target.forward(ids_BT, position_BT=position_T[None], mask=_mask(target, position_T, position_T))
    return _alike(target, own_BTD, ours_BTD)


@contextlib.contextmanager
def _windowed(target: Target, window: int) -> Iterator[Target]:
    """The target with another window in its config, which the model reads in each forward."""
    config = target.model.config.get_text_config()
    own = config.sliding_window
    config.sliding_window = window
    try:
        yield dataclasses.replace(target, window=window)
    finally:
        config.sliding_window = own


def _compare_tree(target: Target, name: str) -> None:
    """Behind three cached rows, two siblings and a child of the first are what they are in chains of their own."""
    past, first, second, child = _ids(target, 3), *(_ids(target, 3) + 3)[0].tolist()
    cache = _Watched()
    position_K = torch.tensor([0, 1, 2, 3, 3, 4], device=target.device)
    sees_TK = torch.ones(6, 6, dtype=torch.bool, device=target.device).tril()
    sees_TK[4, 3] = sees_TK[5, 4] = False
    target.forward(past, position_BT=position_K[None, :3], mask=_mask(target, *[position_K[:3]] * 2), cache=cache)
    cache.updated = False
    tree_BT = torch.tensor([[first, second, child]], device=target.device)
    mask = _mask(target, position_K[3:], position_K, sees_TK[3:])
    tree_BTD = target.forward(tree_BT, position_BT=position_K[None, 3:], mask=mask, cache=cache)
    if cache.asked_by_layer:
        raise TargetError(
            f"{name}: its layers place rows by the length of the cache, so that siblings of a draft would stand at "
            "different positions. Choose another target.model"
        )
    for row, chain in ((0, [first]), (1, [second]), (2, [first, child])):
        if not _alike(target, _in_a_chain(target, past, chain), tree_BTD[:, row]):
            raise TargetError(
                f"{name}: a row of a drafted tree is not what it is alone, so drafts would change the answer. "
                "Choose another target.model"
            )


def _in_a_chain(target: Target, past_BT: torch.Tensor, chain: list[int]) -> torch.Tensor:
    """Features [B,D] of the last token of a chain behind the cached rows, by the same forward as a tree's.

    By another one, bfloat16 alone may make more of a difference than a fault: 30 layers of SmolLM2 amplify the last bit
    of an early layer to 9 % of the feature.
    """
    cache, (batch, rows) = DynamicCache(), past_BT.shape
    position_K = torch.arange(rows + len(chain), device=target.device)
    position_BK = position_K.expand(batch, -1)
    mask = _mask(target, *[position_K[:rows]] * 2)
    target.forward(past_BT, position_BT=position_BK[:, :rows], mask=mask, cache=cache)
    chain_BT = torch.tensor([chain] * batch, device=target.device)
    mask = _mask(target, position_K[rows:], position_K)
    return target.forward(chain_BT, position_BT=position_BK[:, rows:], mask=mask, cache=cache)[:, -1]


def _noise(target: Target) -> float:
    """How far features move by rounding: when a chain is read three times in a batch, by other products, and every
    second number of its embeddings is moved by the last bit, which deep models amplify.

    No row sees the copies, whatever the model makes of masks and positions, so that its faults are not counted.
    """
    past_BT, chain = _ids(target, 3), (_ids(target, 5)[0, 3:]).tolist()
    alone = [_in_a_chain(target, past_BT, chain[:end]) for end in (1, 2)]
    hook = target.model.get_input_embeddings().register_forward_hook(_nudged)
    try:
        copied = [_in_a_chain(target, past_BT.expand(3, -1), chain[:end]) for end in (1, 2)]
    finally:
        hook.remove()
    return max(map(_gap, alone, copied))


def _nudged(module: Any, inputs: Any, embedded_BTD: torch.Tensor) -> torch.Tensor:
    """Every second number of each row, moved by its last bit or two."""
    factor_D = torch.ones_like(embedded_BTD[0, 0])
    factor_D[::2] += torch.finfo(embedded_BTD.dtype).eps
    return embedded_BTD * factor_D


class _Watched(DynamicCache):
    """A cache that notices when a layer, and not the model before its layers, asks for its length."""

    updated = asked_by_layer = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        rows = super().update(*args, **kwargs)
        self.updated = True
        return rows

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        self.asked_by_layer |= self.updated
        return int(super().get_seq_length(*args, **kwargs))


def _bounded(target: Target) -> Target:
    """The longest context in which no row changes with the furthest position of its forward.

    Rotary factors of `longrope` are chosen for all rows of a forward at once, the short or the long ones, by whether it
    reaches past `original_max_position_embeddings`; `generate` reads everything again when it gets there. Up to there
    coral is `generate`; beyond, a draft would have changed the rows it was drafted from.
    """
    last = min(target.max_positions - 1, FAR)
    if last <= SPREAD[-1] or not _changed(target, last):
        return target
    low, high = SPREAD[-1], last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _changed(target, middle) else (middle, high)
    _spread(target, high - 1)  # what the model keeps of the furthest position is as at first
    return dataclasses.replace(target, max_positions=high, bounded=True)


def _changed(target: Target, furthest: int) -> bool:
    """Whether the first rows change when the last one stands at position `furthest`."""
    alone_BTD = _spread(target, SPREAD[-1] + 1)
    return not _gap(alone_BTD, _spread(target, furthest)) <= TOLERANCE[target.dtype]  # as many rows: the same products


def _spread(target: Target, furthest: int) -> torch.Tensor:
    position_T = torch.tensor([*SPREAD, furthest], device=target.device)
    mask = _mask(target, position_T, position_T)
    return target.forward(_ids(target, len(SPREAD) + 1), position_BT=position_T[None], mask=mask)[:, :-1]


def _ids(target: Target, count: int) -> torch.Tensor:
    vocabulary = target.lent.embed_VD.shape[0]
    return (torch.arange(count, device=target.device) % vocabulary)[None]


def _mask(
    target: Target, position_T: torch.Tensor, position_K: torch.Tensor, sees_TK: torch.Tensor | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive [1,1,T,K], or one per layer type; rows see earlier columns, in a window that counts positions."""
    apart_TK = position_T[:, None] - position_K
    seen_TK = apart_TK >= 0 if sees_TK is None else sees_TK
    return target.mask(lambda window: seen_TK & (apart_TK < window) if window else seen_TK)


def _alike(target: Target, one_XD: torch.Tensor, other_XD: torch.Tensor) -> bool:
    """Whether no feature differs by more than rounding."""
    gap = _gap(one_XD, other_XD)
    return gap <= TOLERANCE[target.dtype] or (not target.exact and gap <= NOISE * _noise(target))


def _gap(one_XD: torch.Tensor, other_XD: torch.Tensor) -> float:
    """The largest difference of two features, over the first one's length; no number where a feature is none."""
    gap_X = (one_XD.float() - other_XD.float()).norm(dim=-1) / one_XD.float().norm(dim=-1).clamp_min(1e-6)
    return float(gap_X.max())
