"""Answers side by side: they join and leave between rounds, each with its own sampler, seed and stop rule.

Each has a seat of the same two caches, so that a round is one pass of the target for all of them. A prompt is read
alone when it sits down.
"""

import dataclasses

from coral_core.decoding.cache import SlotCache
from coral_core.decoding.engine import Engine
from coral_core.decoding.rounds import Clock, Round
from coral_core.decoding.sampling import Picker
from coral_core.decoding.seat import Memory, Seat
from coral_core.decoding.step import sit, step


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt: list[int]
    sampler: Picker
    max_new_tokens: int


class Table:
    """So many places over one storage; the first ones are taken."""

    def __init__(self, engine: Engine, places: int) -> None:
        assert places >= 1
        target = dataclasses.replace(engine.target, graphs=False)  # a recording is of one seat
        self.engine, self.places = dataclasses.replace(engine, target=target), places
        self.seats: list[Seat] = []
        layers = engine.target.model.config.get_text_config().num_hidden_layers
        self.cache, self.drafted = SlotCache(layers, 0), SlotCache(1, 0)
        self.clock = Clock()

    @property
    def full(self) -> bool:
        """Whether nobody can sit down."""
        return len(self.seats) == self.places

    def sit(self, request: Request) -> tuple[Seat, Round]:
        """Read a prompt into the first free place, which it keeps unless its first token is its last.

        Raises DataError for a prompt that is empty or does not fit the target's context.
        """
        assert not self.full
        memory = self._memory(len(self.seats))
        memory.forget()
        self.clock.restart()
        seat, event = sit(self.engine, memory, request.prompt, request.sampler, request.max_new_tokens, self.clock)
        if not seat.stop.done:
            self.seats.append(seat)
        return seat, event

    def step(self) -> list[tuple[Seat, Round]]:
        """One round of every answer under way; those that it ends leave."""
        events = list(zip(self.seats, step(self.engine, self.seats, self.clock), strict=True))
        for seat, _ in events:
            if seat.stop.done:
                self.leave(seat)
        return events

    def leave(self, seat: Seat) -> None:
        """Free a place. The last answer moves up, so that the first places are the taken ones."""
        place, last = self.seats.index(seat), self.seats.pop()
        if last is seat:
            return
        for cache in (self.cache, self.drafted):
            cache.move(len(self.seats), place)
        memory = self._memory(place)
        memory.ids, memory.unread, last.memory = last.memory.ids, last.memory.unread, memory
        if last.drafting is not None:
            last.drafting.slots = memory.slots
        self.seats[place] = last

    def _memory(self, place: int) -> Memory:
        return Memory(self.engine.target, self.cache.seat(place), self.drafted.seat(place))
