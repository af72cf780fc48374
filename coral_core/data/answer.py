"""The target writes: many prompts at once, by plain decoding; rows that end make room for rows that wait.

A test holds the greedy words equal to `model.generate`'s, which runs a batch until its longest row ends.
"""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Sequence

from coral_core.decoding.engine import Engine
from coral_core.decoding.rounds import Round
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


Advance = Callable[[set[int], int], None]
"""(the prompts whose answers ended, tokens written) since the call before."""


def write(
    target: Target,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    ends: Callable[[list[int]], bool],
    sampling: Sampling,
    advance: Advance = lambda ended, tokens: None,
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

    def keep(seat: Seat, new_ids: list[int]) -> None:
        """Take a seat's new tokens; it leaves where they end its row. Raises DataError where numbers overflow."""
        if seat.error:
            raise seat.error
        ids = written[row_of[seat]]
        ids += new_ids
        if seat in table.seats and ends(ids):
            table.leave(seat)

    while waiting or table.seats:
        events: list[tuple[Seat, Round]] = []
        while waiting and not table.full:
            row = waiting.popleft()
            sampler = Sampler(temperature=sampling.temperature, seed=derive_seed(sampling.seed, row))
            seat, event = table.sit(Request(prompts[row], sampler, limits[row]))
            row_of[seat] = row
            keep(seat, event.new_ids)
            events.append((seat, event))
        for seat, event in table.step() if table.seats else ():
            keep(seat, event.new_ids)
            events.append((seat, event))
        ended = {row_of[seat] for seat, _ in events if seat not in table.seats}
        advance(ended, sum(len(event.new_ids) for _, event in events))
    return written


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed of 32 bits for one part of a run: torch's generator drops the bits above."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "big")
