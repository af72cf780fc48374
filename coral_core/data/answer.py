"""The target writes: many prompts at once, by plain decoding; rows that end make room for rows that wait.

A test holds the greedy words equal to `model.generate`'s, which runs a batch until its longest row ends.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Sequence

from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.seat import Seat
from coral_core.decoding.table import Request, Table
from coral_core.target.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are picked, and how many rows are written at once."""

    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Each prompt has a seed of its own, made from this one: a row's words do not depend on its neighbours."""
    batch_size: int = 32


Advance = Callable[[int, int], None]
"""(rows ended, tokens written) since the call before."""


def write(
    target: Target,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    ends: Callable[[list[int]], bool],
    sampling: Sampling,
    advance: Advance = lambda rows, tokens: None,
) -> list[list[int]]:
    """Continue each prompt until `ends(new ids)`, or `limits` tokens; the token that ends it is kept.

    Raises DataError where the target's numbers overflow: the answer would be cut there.
    """
    assert all(limit >= 1 for limit in limits) and all(prompts), "every prompt has a token, and room for one more"
    engine = Engine(dataclasses.replace(target, stop_ids=frozenset()))  # where a row ends is for `ends` to say
    table = Table(engine, max(1, min(sampling.batch_size, len(prompts))))
    written: list[list[int]] = [[] for _ in prompts]
    row_of: dict[Seat, int] = {}
    waiting = deque(sorted(range(len(prompts)), key=lambda row: len(prompts[row])))

    def ended(seat: Seat, new_ids: list[int]) -> bool:
        """Whether a seat's row has ended with these tokens, which are kept. Raises DataError where numbers overflow."""
        if seat.error:
            raise seat.error
        ids = written[row_of[seat]]
        ids += new_ids
        if seat in table.seats and ends(ids):
            table.leave(seat)
        return seat not in table.seats

    while waiting or table.seats:
        rows = tokens = 0
        while waiting and not table.full:
            row = waiting.popleft()
            sampler = Sampler(temperature=sampling.temperature, seed=derive_seed(sampling.seed, row))
            seat, event = table.sit(Request(prompts[row], sampler, limits[row]))
            row_of[seat] = row
            rows, tokens = rows + ended(seat, event.new_ids), tokens + len(event.new_ids)
        for seat, event in table.step() if table.seats else ():
            rows, tokens = rows + ended(seat, event.new_ids), tokens + len(event.new_ids)
        advance(rows, tokens)
    return written


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of 32 bits for one part of a run: torch's generator drops the bits above."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "big")
