"""Plain and speculative decoding of the same questions, in one process, taking turns.

Which decoder goes first changes from question to question, so that a machine that slows down or speeds up favours
none. The history of a later turn holds the plain answer for all.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from coral_core.bench.divergence import diverges
from coral_core.bench.questions import Question
from coral_core.decoding.engine import Engine, plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.errors import DataError
from coral_core.target.target import Target
from coral_core.target.template import prompt_ids

PLAIN = "plain"
"""The lane of our own plain loop, in the target's dtype: the reference."""


@dataclasses.dataclass(frozen=True)
class Lane:
    """One decoding of one turn."""

    ids: list[int]
    prefill_s: float
    decode_s: float
    """Everything after the first token."""
    accepted_drafts: list[int]
    """Per round after the prefill."""
    emitted: list[int]
    """Tokens per round; fewer than accepted_drafts + 1 where the answer ended."""
    seconds: dict[str, float]
    """By phase, prefill apart."""
    plain_rounds: int = 0
    """Rounds that drafted nothing: in a drafted lane, because it would not have paid."""
    copied_rounds: int = 0
    """Rounds whose drafts were copied from the text, without the drafter."""


Decode = Callable[[list[int]], Lane]
"""Decodes one prompt, and times it."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one question, decoded by every lane: PLAIN, one per method, and the other plain decoders."""

    question: str
    turn: int
    prompt_tokens: int
    lanes: dict[str, Lane]
    divergence: dict[str, dict[str, Any] | None]
    """Per method, where its ids leave the plain ones (`diverges`)."""

    @property
    def plain_lanes(self) -> list[str]:
        """Names of the lanes that draft nothing."""
        return [name for name in self.lanes if name not in self.divergence]


def run_lane(rounds: Iterable[Round]) -> Lane:
    """Decode and time it. The clock includes whatever the generator does between rounds."""
    ids: list[int] = []
    accepted: list[int] = []
    emitted: list[int] = []
    seconds: dict[str, float] = {}
    kinds: list[str] = []
    begun = first = time.perf_counter()
    for event in rounds:
        if event.kind == "prefill":
            first = time.perf_counter()
        else:
            for phase, value in event.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
            accepted.append(event.accepted_drafts)
            emitted.append(len(event.new_ids))
            kinds.append(event.kind)
        ids += event.new_ids
    counts = kinds.count("plain"), kinds.count("copy")
    return Lane(ids, first - begun, time.perf_counter() - first, accepted, emitted, seconds, *counts)


@dataclasses.dataclass(frozen=True)
class Racers:
    """Who decodes."""

    target: Target
    engines: dict[str, Engine]
    """Per method."""
    sampler: Sampler
    max_new_tokens: int
    others: dict[str, Decode] = dataclasses.field(default_factory=dict)
    """Plain decoders besides our own loop (baseline.py)."""

    def lanes(self) -> dict[str, Decode]:
        """Every decoder by its lane's name."""
        found: dict[str, Decode] = {PLAIN: self._plain}
        for name, engine in self.engines.items():
            found[name] = lambda prompt, engine=engine: run_lane(  # type: ignore[misc]
                engine.decode(prompt, self.sampler, self.max_new_tokens)
            )
        return found | self.others

    def _plain(self, prompt: list[int]) -> Lane:
        return run_lane(plain(self.target, prompt, self.sampler, self.max_new_tokens))


def race(racers: Racers, questions: Sequence[Question], done: int = 0) -> Iterator[list[Turn]]:
    """Yield each question's turns as they are done, behind the `done` first ones. Every lane warms up, uncounted.

    A question that does not fit the target's context yields the turns that did, perhaps none.
    """
    if done == len(questions):
        return
    warm = fitting(racers.target, questions)[0]
    for lane in racers.lanes().values():
        lane(warm)
    for number in range(done, len(questions)):
        yield list(_race_question(racers, questions[number], number))


def fitting(target: Target, questions: Sequence[Question]) -> list[list[int]]:
    """The first turns' prompts that fit the target's context. Raises DataError when none does."""
    prompts = [first_prompt(target, question) for question in questions]
    found = [prompt for prompt in prompts if len(prompt) < target.max_positions]
    if not found:
        shortest = min(map(len, prompts), default=0)
        raise DataError(
            f"no question fits the target's context of {target.max_positions} tokens (the shortest has {shortest}); "
            "use shorter ones"
        )
    return found


def _race_question(racers: Racers, question: Question, number: int) -> Iterator[Turn]:
    target = racers.target
    messages: list[dict[str, str]] = []
    for index, words in enumerate(question.turns or ("",)):
        messages.append({"role": "user", "content": words})
        prompt = prompt_ids(target.tokenizer, messages) if question.turns else list(question.ids)
        if len(prompt) >= target.max_positions:
            return  # the dialogue outgrew the context; what came before still counts
        lanes = _take_turns(racers.lanes(), prompt, number)
        said = lanes[PLAIN].ids
        divergence = {name: diverges(target, racers.sampler, prompt, said, lanes[name].ids) for name in racers.engines}
        yield Turn(question.name, index, len(prompt), lanes, divergence)
        if index + 1 < len(question.turns):
            answer = target.tokenizer.decode(said, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})


def _take_turns(lanes: dict[str, Decode], prompt: list[int], number: int) -> dict[str, Lane]:
    names = list(lanes)
    first = number % len(names)
    done = {name: lanes[name](prompt) for name in names[first:] + names[:first]}
    return {name: done[name] for name in names}


def first_prompt(target: Target, question: Question) -> list[int]:
    """The prompt of a question's first turn."""
    if question.ids:
        return list(question.ids)
    return prompt_ids(target.tokenizer, [{"role": "user", "content": question.turns[0]}])
