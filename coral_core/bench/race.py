"""Plain and speculative decoding of the same questions, in one process, taking turns.

Which of the two goes first alternates from question to question, so that a machine that slows down or speeds up
favours neither. The history of a later turn holds the plain answer in both lanes.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from coral_core.bench.questions import Question
from coral_core.decoding.engine import Engine
from coral_core.decoding.plain import plain
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.target.load import Target
from coral_core.target.template import prompt_ids


@dataclasses.dataclass(frozen=True)
class Lane:
    """One decoding of one turn."""

    ids: list[int]
    prefill_s: float
    decode_s: float
    """Everything after the first token."""
    accepted_drafts: list[int]
    """Per draft round."""
    emitted: list[int]
    """Tokens per draft round; fewer than accepted_drafts + 1 where the answer ended."""
    seconds: dict[str, float]
    """By phase, prefill apart."""


Decode = Callable[[list[int]], Lane]
"""Decodes one prompt, and times it."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one question, decoded by every lane."""

    question: str
    turn: int
    prompt_tokens: int
    plain: Lane
    speculative: Lane
    baseline: Lane | None
    """Where something else decodes plainly faster than our own loop."""
    divergence: dict[str, Any] | None
    """Where speculative ids leave the plain ones: position, both tokens, and the gap of the target's two logits."""


def run_lane(rounds: Iterable[Round]) -> Lane:
    """Decode and time it. The clock includes whatever the generator does between rounds."""
    ids: list[int] = []
    accepted: list[int] = []
    emitted: list[int] = []
    seconds: dict[str, float] = {}
    begun = first = time.perf_counter()
    for event in rounds:
        if event.kind == "prefill":
            first = time.perf_counter()
        else:
            for phase, value in event.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
        if event.kind == "draft":
            accepted.append(event.accepted_drafts)
            emitted.append(len(event.new_ids))
        ids += event.new_ids
    return Lane(ids, first - begun, time.perf_counter() - first, accepted, emitted, seconds)


@dataclasses.dataclass(frozen=True)
class Racers:
    """Who decodes."""

    engine: Engine
    sampler: Sampler
    max_new_tokens: int
    baseline: Decode | None = None
    """A faster plain decoder than our own loop, if one was found."""

    def decode_plain(self, prompt: list[int]) -> Lane:
        """Our own loop."""
        return run_lane(plain(self.engine.target, prompt, self.sampler, self.max_new_tokens))

    def decode_speculative(self, prompt: list[int]) -> Lane:
        """The engine."""
        return run_lane(self.engine.decode(prompt, self.sampler, self.max_new_tokens))


def race(racers: Racers, questions: list[Question]) -> Iterator[list[Turn]]:
    """Yield each question's turns as they are done. A first decoding of the first question warms up, uncounted."""
    target = racers.engine.target
    for lane in _lanes(racers).values():
        lane(first_prompt(target, questions[0]))
    for number, question in enumerate(questions):
        yield list(_race_question(racers, question, backwards=bool(number % 2)))


def _race_question(racers: Racers, question: Question, *, backwards: bool) -> Iterator[Turn]:
    target = racers.engine.target
    messages: list[dict[str, str]] = []
    for index, words in enumerate(question.turns or ("",)):
        messages.append({"role": "user", "content": words})
        prompt = prompt_ids(target.tokenizer, messages) if question.turns else list(question.ids)
        if len(prompt) >= target.max_positions:
            return  # the dialogue outgrew the context; what came before still counts
        turn = _race_turn(racers, prompt, backwards=backwards)
        yield dataclasses.replace(turn, question=question.name, turn=index)
        answer = target.tokenizer.decode(turn.plain.ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def first_prompt(target: Target, question: Question) -> list[int]:
    """The prompt of a question's first turn."""
    if question.ids:
        return list(question.ids)
    return prompt_ids(target.tokenizer, [{"role": "user", "content": question.turns[0]}])


def _lanes(racers: Racers) -> dict[str, Decode]:
    lanes: dict[str, Decode] = {"plain": racers.decode_plain, "speculative": racers.decode_speculative}
    if racers.baseline is not None:
        lanes["baseline"] = racers.baseline
    return lanes


def _race_turn(racers: Racers, prompt: list[int], *, backwards: bool) -> Turn:
    lanes = _lanes(racers)
    order = list(lanes)[:: -1 if backwards else 1]
    done = {name: lanes[name](prompt) for name in order}
    plain_lane, speculative = done["plain"], done["speculative"]
    return Turn(
        question="",
        turn=0,
        prompt_tokens=len(prompt),
        plain=plain_lane,
        speculative=speculative,
        baseline=done.get("baseline"),
        divergence=diverges(racers.engine.target, prompt, plain_lane.ids, speculative.ids),
    )


@torch.no_grad()
def diverges(target: Target, prompt: list[int], plain_ids: list[int], ids: list[int]) -> dict[str, Any] | None:
    """None when the ids are equal; else where they part, and how far apart the target's two logits are there.

    A gap near the dtype's rounding is a tie that batch size decided; a wide one is a bug.
    """
    if plain_ids == ids:
        return None
    at = next((i for i, pair in enumerate(zip(plain_ids, ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return {"position": min(len(plain_ids), len(ids)), "reason": "one answer is longer"}
    context = torch.tensor([prompt + plain_ids[:at]], device=target.device)
    logits_V = target.lent.logits(target.forward(context)[0, -1]).float()
    gap = float((logits_V[plain_ids[at]] - logits_V[ids[at]]).abs())
    return {"position": at, "plain": plain_ids[at], "speculative": ids[at], "logit_gap": gap}
