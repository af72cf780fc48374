"""What a head is worth on this device: from measured parts to the time of a round and the speed of decoding.

    round time = round with the full head - its head's share + head calls x time of one call
    tau        = 1 + Σ_d Π_{i<=d} hit_rate_i · kept

where `hit_rate_i` is how often a round that had i - 1 drafts accepted has the i-th too, and `kept` how often the token
that the full head drafts is among the rows that are read. Not modelled: a smaller head drafts other wrong tokens, and
prunes other branches. Axes: N row, D hidden, X any axes.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from coral_core.head.heads import Head

EVICT_BYTES = 1 << 27
"""Read between two timed calls: in a round, the target's weights push the head's rows out of the cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundCost:
    """One mean round with the full head, as decoding on this device measured it."""

    hit_rates: list[float]
    """By depth: of the rounds that got there, the share whose next draft was accepted too."""
    round_s: float
    head_s: float
    """Of it, in the head."""
    head_calls: float
    """Head calls per round: the first reads one row, the others a level's."""
    level_rows: int
    """Rows of the later calls."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one head."""

    tokens_per_round: float
    round_s: float
    tokens_per_s: float
    speedup: float
    """Over the full head."""


def predict(cost: RoundCost, *, full_call_s: float, call_s: float, kept: float) -> Prediction:
    """The round of another head, whose calls take `call_s` where the full head's take `full_call_s`.

    Both are timed alone, and scaled by what the full head's calls took in the round.
    """
    tau, full_tau = (1 + sum(_reached(cost.hit_rates, share)) for share in (kept, 1.0))
    round_s = cost.round_s - cost.head_s * (1 - call_s / full_call_s)
    full_per_s = full_tau / cost.round_s
    return Prediction(
        tokens_per_round=tau,
        round_s=round_s,
        tokens_per_s=tau / round_s,
        speedup=tau / round_s / full_per_s,
    )


def _reached(hit_rates: Sequence[float], kept: float) -> list[float]:
    return list(itertools.accumulate((share * kept for share in hit_rates), lambda a, b: a * b))


def hit_rates(accepted_drafts: Sequence[int]) -> list[float]:
    """By depth, the share of rounds with at least d accepted drafts among those with at least d - 1.

    Rounds of 0, 1, 1 and 3 drafts: [3/4, 1/3, 1/1].
    """
    reached = [sum(count >= depth for count in accepted_drafts) for depth in range(max(accepted_drafts, default=0) + 1)]
    return [now / before for before, now in itertools.pairwise(reached)]


@torch.no_grad()
def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 15) -> list[float]:
    """Median seconds of each call, taking turns, with a cold cache."""
    evict_X = torch.zeros(EVICT_BYTES // 4, device=device)
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, seconds in zip(calls, spent, strict=True):
            evict_X.amax()
            _wait(device)
            begun = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:
                seconds.append(time.perf_counter() - begun)
    return [statistics.median(seconds) for seconds in spent]


def time_heads(heads: Sequence[Head], hidden_ND: torch.Tensor, cost: RoundCost) -> list[float]:
    """Seconds of a mean call of each head in such rounds, its best tokens picked."""
    some_ND = hidden_ND[: cost.level_rows]
    one = time_calls([partial(_best, head, some_ND[:1]) for head in heads], hidden_ND.device)
    several = time_calls([partial(_best, head, some_ND) for head in heads], hidden_ND.device)
    first = 1 / max(1.0, cost.head_calls)
    return [first * once + (1 - first) * level for once, level in zip(one, several, strict=True)]


def _best(head: Head, hidden_ND: torch.Tensor) -> None:
    head.candidates(hidden_ND).best(4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
