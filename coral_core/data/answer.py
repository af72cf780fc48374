"""The target writes: many prompts at once, by plain decoding; rows that end make room for rows that wait.

A test holds the greedy words equal to `model.generate`'s, which runs a batch until its longest row ends.
Axes: T position, I input width: the taps and the feature, side by side.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Sequence

import torch

from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Seat
from coral_core.decoding.table import Request, Table
from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are picked, how many rows are written at once, and what is kept of the target's states."""

    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Each prompt has a seed of its own, made from this one: a row's words do not depend on its neighbours."""
    batch_size: int = 32
    keep: torch.dtype | None = None
    """The dtype in which what the target gives at each token is kept, in the CPU's memory: then nothing has to be read
    a second time for its features. None: nothing is."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What the target wrote behind one prompt."""

    ids: list[int]
    given_TI: torch.Tensor | None = None
    """What it gave at each token of the prompt and of `ids` (`Target.forward`), where that was to be kept. None too
    where the answer fills the context: its last token was never read."""


Advance = Callable[[set[int], int], None]
"""(the prompts whose answers ended, tokens written) since the call before."""


def write(
    target: Target,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    ends: Callable[[list[int]], bool],
    sampling: Sampling,
    advance: Advance = lambda ended, tokens: None,
) -> list[Written]:
    """Continue each prompt until `ends(new ids)`, or `limits` tokens; the token that ends it is kept.

    Raises DataError where the target's numbers overflow: the answer would be cut there.
    """
    assert all(limit >= 1 for limit in limits) and all(prompts), "every prompt has a token, and room for one more"
    target = dataclasses.replace(target, stop_ids=frozenset())  # where a row ends is for `ends` to say
    keep = sampling.keep
    table = Table(Engine(target, keeps_features=keep is not None), max(1, min(sampling.batch_size, len(prompts))))
    written: list[list[int]] = [[] for _ in prompts]
    given: list[torch.Tensor | None] = [None for _ in prompts]
    row_of: dict[Seat, int] = {}  # of those under way: a sampler's noise takes 40 MB with 151,936 tokens
    whole: set[Seat] = set()  # answers that have ended, and stay for a round, which reads their last token
    ended: set[int] = set()
    waiting = deque(sorted(range(len(prompts)), key=lambda row: len(prompts[row])))

    def take(seat: Seat, new_ids: list[int]) -> int:
        """Take a seat's new tokens, and say how many; it leaves where its row is done."""
        if seat.error:
            raise seat.error
        row, stays = row_of[seat], seat in table.seats
        if seat in whole:
            new_ids, given[row] = [], seat.memory.unread.join()[1].to("cpu", keep)
        else:
            ids = written[row]
            ids += new_ids
            if stays and not ends(ids) and len(ids) < limits[row]:
                return len(new_ids)
            if stays and keep is not None:
                whole.add(seat)
                return len(new_ids)
        seat.memory.unread.cut(0, 0)
        if stays:
            table.leave(seat)
        whole.discard(seat)
        del row_of[seat]
        ended.add(row)
        return len(new_ids)

    while waiting or table.seats:
        ended, tokens = set(), 0
        while waiting and not table.full:
            row = waiting.popleft()
            sampler = Sampler(temperature=sampling.temperature, seed=derive_seed(sampling.seed, row))
            seat, event = table.sit(Request(prompts[row], sampler, limits[row] + int(keep is not None)))
            row_of[seat] = row
            tokens += take(seat, event.new_ids)
        for seat, event in table.step() if table.seats else ():
            tokens += take(seat, event.new_ids)
        advance(ended, tokens)
    return [Written(*parts) for parts in zip(written, given, strict=True)]


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of 32 bits for one part of a run: torch's generator drops the bits above."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "big")
