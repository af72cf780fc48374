"""One dialogue with a target: its messages, its caches between turns, its numbers. No terminal in here."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from coral_core.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from coral_core.decoding.engine import Engine
    from coral_core.decoding.rounds import Round
    from coral_core.decoding.sampling import Sampler
    from coral_core.target.target import Target

SAMPLE_TOKENS = 16
"""Plain tokens that are decoded to compare with, where no answer of the session was plain."""
SAMPLE_S = 1.0
"""No more than this is spent on them, on a target however slow."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that became final, and the level at which its token was drafted; 0 is the target's own."""

    text: str
    depth: int


@dataclasses.dataclass
class Tally:
    """What answers took: as in `coral eval` without the prefill and its token, and without the time of drawing."""

    answers: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    accepted: list[int] = dataclasses.field(default_factory=list)
    """Accepted drafts of each round; 0 where nothing was drafted, because it would not have paid."""
    plain_rounds: int = 0
    """How many those were."""
    copied_rounds: int = 0
    """Rounds whose drafts were copied from the text."""

    def count(self, event: Round, elapsed_s: float) -> None:
        """Add a round; a prefill is none."""
        if event.kind != "prefill":
            self.tokens += len(event.new_ids)
            self.elapsed_s += elapsed_s
            self.accepted.append(event.accepted_drafts)
            self.plain_rounds += event.kind == "plain"
            self.copied_rounds += event.kind == "copy"

    def add(self, other: Tally) -> None:
        """Add an answer's tally."""
        self.answers += 1
        self.tokens += other.tokens
        self.elapsed_s += other.elapsed_s
        self.accepted += other.accepted
        self.plain_rounds += other.plain_rounds
        self.copied_rounds += other.copied_rounds

    @property
    def tokens_per_s(self) -> float | None:
        """None before there is anything to divide."""
        return self.tokens / self.elapsed_s if self.tokens and self.elapsed_s else None

    @property
    def tokens_per_round(self) -> float | None:
        """tau."""
        return self.tokens / len(self.accepted) if self.accepted else None


@dataclasses.dataclass
class Answer:
    """One answer while it is told, and afterwards."""

    prompt: list[int]
    drafted: bool
    ids: list[int] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)
    ended: str = ""
    """Why it ended, where the target did not end it itself: stopped, limit or context."""
    hides: bool = False
    """Whether special tokens part it, so that the next turn is told its words run together."""


class Session:
    """A dialogue that goes on until it is cleared; its settings may change between any two answers."""

    def __init__(
        self, target: Target, sampler: Sampler, max_new_tokens: int, assemble: Callable[[], Engine], *, drafted: bool
    ) -> None:
        self.target, self.sampler, self.max_new_tokens = target, sampler, max_new_tokens
        self._assemble = assemble
        self._engine: Engine | None = None
        self.system = ""
        self.forget_numbers()
        self.last: Answer | None = None
        self.speculative = False
        self.clear()
        if drafted:
            self.draft(True)

    def clear(self) -> None:
        """Forget what was said, and free its caches; settings and numbers stay."""
        from coral_core.decoding.seat import Memory

        self.messages: list[dict[str, str]] = []
        self.memory = Memory(self.target)
        self._said: list[int] = []
        """The dialogue's tokens as they were read and written."""

    def forget_numbers(self) -> None:
        """Count anew: at another temperature drafts are accepted more often, or less."""
        self.plain, self.drafted, self.sampled = Tally(), Tally(), Tally()

    def draft(self, wanted: bool) -> None:
        """Decode with the drafter from now on, or without. Raises ArtifactError when there is none to load."""
        if wanted and self._engine is None:
            self._engine = self._assemble()
        self.speculative = wanted

    @property
    def opening(self) -> list[dict[str, str]]:
        """The system prompt as a message, where there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    @property
    def length(self) -> int:
        """Tokens of the dialogue so far."""
        return len(self._said)

    def answer(self, words: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[list[Piece]]:
        """Yield the answer a round at a time. Raises DataError, and forgets the question, when it cannot be asked.

        Ends early once `stopped` says so, or by a KeyboardInterrupt inside the model; what was said is kept then too,
        unless it is nothing.
        """
        from coral_core.api.stream import TextStream
        from coral_core.target.template import hides

        question = {"role": "user", "content": words}
        answer = self.last = Answer(self._prompt([*self.opening, *self.messages, question]), self.speculative)
        stream = TextStream(self.target.tokenizer)
        rounds = timed(self._decode(answer.prompt))
        try:
            for event, elapsed_s in rounds:
                answer.tally.count(event, elapsed_s)
                answer.ids += event.new_ids
                yield [Piece(stream.feed([token]), depth) for token, depth in _depths(event)]
                if stopped():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            answer.ended = "stopped"
        else:
            answer.ended = self._ending(answer)
        if rest := stream.rest():
            yield [Piece(rest, 0)]
        (self.drafted if answer.drafted else self.plain).add(answer.tally)
        if answer.ids:
            reply = {"role": "assistant", "content": stream.text}
            answer.hides = hides(self.target.tokenizer, answer.ids, self.target.stop_ids)
            self.messages, self._said = [*self.messages, question, reply], answer.prompt + answer.ids

    def compare(self) -> None:
        """Where no answer was plain yet, decode a few tokens plainly after the last one, to throw away.

        They go on from the caches as they are, so that this costs no second prefill; the next turn cuts them off.
        """
        from coral_core.decoding.engine import plain

        if not self.drafted.tokens or self.plain.tokens or self.sampled.tokens:
            return
        endless, sampled = dataclasses.replace(self.target, stop_ids=frozenset()), Tally()
        with contextlib.suppress(DataError, KeyboardInterrupt):  # a full context has no room for them
            for event, elapsed_s in timed(plain(endless, self._said, self.sampler, SAMPLE_TOKENS + 1, self.memory)):
                sampled.count(event, elapsed_s)
                if sampled.elapsed_s > SAMPLE_S:
                    break
        self.sampled = sampled

    def speedup(self) -> tuple[float, str] | None:
        """Tokens/s of the drafted answers over plain decoding's, and what that was measured on."""
        measured = self.plain if self.plain.tokens else self.sampled
        fast, slow = self.drafted.tokens_per_s, measured.tokens_per_s
        if not fast or not slow:
            return None
        if measured is self.sampled:
            return fast / slow, f"a sample of {measured.tokens} plain tokens"
        return fast / slow, f"{measured.tokens:,} plain tokens of this session"

    def _decode(self, prompt: list[int]) -> Iterator[Round]:
        from coral_core.decoding.engine import plain

        if self.speculative:
            assert self._engine is not None
            return self._engine.decode(prompt, self.sampler, self.max_new_tokens, self.memory)
        return plain(self.target, prompt, self.sampler, self.max_new_tokens, self.memory)

    def _ending(self, answer: Answer) -> str:
        if answer.ids[-1] in self.target.stop_ids:
            return ""
        full = len(answer.prompt) + len(answer.ids) >= self.target.max_positions
        return "context" if full else "limit"

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of the dialogue, with the answers as the target wrote them wherever the template tells them unchanged.

        Words may be cut into tokens in several ways, and a target does not always write the tokenizer's own: read
        back from text, an answer would be forwarded again from the first token that differs.
        """
        from coral_core.target.template import render, text_ids

        tokenizer = self.target.tokenizer
        text = render(tokenizer, messages, generation_prompt=True)
        whole = text_ids(tokenizer, text)
        for said in (self._said, self._said[:-1]):  # the stop token may be another than the template's
            before = tokenizer.decode(said) if said else ""
            if before and text.startswith(before):
                added = text_ids(tokenizer, text[len(before) :])
                if whole[-len(added) :] == added:  # cut alike in its place and alone
                    return said + added
        return whole


def timed(rounds: Iterable[Round]) -> Iterator[tuple[Round, float]]:
    """Each round with the seconds that it took, without those that its reader takes."""
    pending = iter(rounds)
    while True:
        begun_s = time.perf_counter()
        event = next(pending, None)
        if event is None:
            return
        yield event, time.perf_counter() - begun_s


def _depths(event: Round) -> Iterator[tuple[int, int]]:
    """A round's tokens with the levels at which they were drafted."""
    for number, token in enumerate(event.new_ids, start=1):
        yield token, number if number <= event.accepted_drafts else 0


def transcript(session: Session) -> dict[str, Any]:
    """What /save writes."""
    return {"messages": [*session.opening, *session.messages]}
