"""The target writes: many prompts at once, rows that end making room for rows that wait.

Prompts are padded on the left, so that all rows append to one cache. `model.generate` runs a batch until its longest
row ends; most answers are much shorter than the longest, so here a row leaves when it ends and others are let in.
256 answers of pico on one core, in float32, prompts sorted by length: 542 tokens/s in batches of 32; `generate` 217 and
256 in batches of 64. A test holds the words equal to `model.generate`'s.

Not the plain decoding that `coral eval` times: that is one dialogue at a time, in decoding/.
Axes: B live row, T position, K cached position, D hidden, V vocabulary, R prompt, S step.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from coral_core.target.load import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are picked, and how many rows are written at once."""

    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of one uniform number for each prompt and step, so that a row's words do not depend on its neighbours."""
    batch_size: int = 32


Advance = Callable[[int, int], None]
"""(rows ended, tokens written) since the call before."""


@torch.no_grad()
def write(
    target: Target,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    ends: Callable[[list[int]], bool],
    sampling: Sampling,
    advance: Advance = lambda rows, tokens: None,
) -> list[list[int]]:
    """Continue each prompt until `ends(new ids)`, or `limits` tokens; the token that ends it is kept."""
    assert all(limit >= 1 for limit in limits) and all(prompts), "every prompt has a token, and room for one more"
    generator = torch.Generator().manual_seed(sampling.seed)
    uniform_RS = torch.rand(len(prompts), max(limits, default=0), generator=generator)
    written: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    live = _Live(target)
    while waiting or live.rows:
        room = sampling.batch_size - len(live.rows)
        if waiting and room >= max(1, sampling.batch_size // 4):
            entering = [waiting.pop() for _ in range(min(room, len(waiting)))]
            live.admit(entering, [prompts[row] for row in entering])
        uniform_B = torch.stack([uniform_RS[row, len(written[row])] for row in live.rows])
        token_B = pick(target.logits(live.feature_BD), sampling.temperature, uniform_B).tolist()
        for row, token in zip(live.rows, token_B, strict=True):
            written[row].append(token)
        stay = [
            place for place, row in enumerate(live.rows) if len(written[row]) < limits[row] and not ends(written[row])
        ]
        advance(len(live.rows) - len(stay), len(live.rows))
        live.step(stay, [token_B[place] for place in stay])
    return written


def pick(logits_BV: torch.Tensor, temperature: float, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token per row: the likeliest, or where the cumulative distribution passes the row's uniform number."""
    if not temperature:
        return logits_BV.argmax(-1)
    cumulative_BV = (logits_BV.float() / temperature).softmax(-1).double().cumsum(-1)
    point_B1 = uniform_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True).squeeze(-1).clamp_max(logits_BV.shape[-1] - 1)


class _Live:
    """The rows being written: one cache, padded on the left."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.rows: list[int] = []
        self.feature_BD = torch.empty(0)
        """What the next tokens are picked from."""
        self._cache: Any = None
        self._valid_BK = torch.empty(0)

    def admit(self, rows: list[int], prompts: list[list[int]]) -> None:
        """Read the prompts of new rows, and put them below the rows that are there."""
        device = self.target.device
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        ids_BT = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=device)
        valid_BT = torch.arange(width, device=device) >= torch.tensor(pads, device=device)[:, None]
        cache = _empty_cache()
        feature_BD = self._forward(ids_BT, (valid_BT.cumsum(1) - 1).clamp_min(0), valid_BT, cache)
        if self.rows:
            feature_BD = torch.cat([self.feature_BD, feature_BD])
            self._valid_BK, valid_BT = _widen(self._valid_BK, valid_BT, dim=1)
            valid_BT = torch.cat([self._valid_BK, valid_BT])
            for old, new in zip(self._cache.layers, cache.layers, strict=True):
                new.keys = torch.cat(_widen(old.keys, new.keys, dim=2))
                new.values = torch.cat(_widen(old.values, new.values, dim=2))
        self.rows = self.rows + rows
        self.feature_BD, self._valid_BK, self._cache = feature_BD, valid_BT, cache

    def step(self, stay: list[int], tokens: list[int]) -> None:
        """Let the rows at the other places go, and append one token to each that stays."""
        if len(stay) < len(self.rows):
            self._keep(stay)
        if not stay:
            return
        position_BT = self._valid_BK.sum(1, keepdim=True)
        self._valid_BK = torch.nn.functional.pad(self._valid_BK, (0, 1), value=True)
        ids_BT = torch.tensor(tokens, device=self.target.device)[:, None]
        self.feature_BD = self._forward(ids_BT, position_BT, self._valid_BK, self._cache)

    def _keep(self, stay: list[int]) -> None:
        """Cut out rows, and the columns on the left that are padding in all that stay."""
        self.rows = [self.rows[place] for place in stay]
        index_B = torch.tensor(stay, dtype=torch.long, device=self.target.device)
        self._valid_BK = self._valid_BK[index_B]
        first = int(self._valid_BK.any(0).int().argmax()) if stay else 0
        self._valid_BK = self._valid_BK[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[index_B, :, first:]
            layer.values = layer.values[index_B, :, first:]

    def _forward(
        self, ids_BT: torch.Tensor, position_BT: torch.Tensor, valid_BK: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Features [B, D] of the last column."""
        return self.target.forward(ids_BT, position_BT=position_BT, mask=valid_BK.long(), cache=cache)[:, -1]


def _empty_cache() -> Any:
    """A cache that keeps every position: one made from a config drops those outside a sliding window, and rows of
    different ages could then not be put together."""
    from transformers import DynamicCache

    return DynamicCache()


def _widen(one: torch.Tensor, other: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with zeros in front along `dim`, to the length of the longer."""

    def widened(x: torch.Tensor, length: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = length - shape[dim]
        return torch.cat([x.new_zeros(shape), x], dim) if shape[dim] else x

    length = max(one.shape[dim], other.shape[dim])
    return widened(one, length), widened(other, length)


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of 32 bits for one part of a run: torch's generator drops the bits above."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "big")
