"""One answer as text: a request in, pieces of text out, cut at the client's stop strings.

All of it runs in the worker's thread: model and tokenizer have one user.
"""

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from coral_core.api.stream import TextStream
from coral_core.decoding.engine import Engine
from coral_core.decoding.rounds import Round
from coral_core.decoding.sampling import Sampler
from coral_core.decoding.table import Request
from coral_core.errors import DataError
from coral_core.serve.protocol import NOTES, Ask, Refusal
from coral_core.target.target import Target
from coral_core.target.template import Message, prompt_ids, render, shown_fields


@dataclasses.dataclass(frozen=True)
class Service:
    """What answers: a model under a name, and the recipe's settings for what a request leaves open."""

    name: str
    engine: Engine
    sampler: Sampler
    max_new_tokens: int

    @property
    def target(self) -> Target:
        """Whose answers they are."""
        return self.engine.target


@dataclasses.dataclass(frozen=True)
class Opened:
    """A request that is being answered."""

    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one round added to an answer."""

    text: str
    tokens: int
    """New tokens; those behind a stop string are not counted, so that the count depends on the answer alone."""
    drafted: bool = False
    """Whether it came from a round of drafting and verification, and not from the prefill."""
    finish: Literal["stop", "length"] | None = None
    """Set on the last piece: a stop token or string, or the limit."""


class StopText:
    """Holds back text that may be the beginning of a stop string, and ends at the first one that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """The text that can be shown now; sets `hit`, and then shows nothing of the stop string or beyond."""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        self.hit = bool(places)
        shown = min(places) if places else len(self.held) - self._unsure()
        text, self.held = self.held[:shown], self.held[shown:]
        return text

    def _unsure(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self.held))
        ends = (length for length in range(longest, 0, -1) if self._begins_stop(self.held[-length:]))
        return next(ends, 0)

    def _begins_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self.stops)


class Answer:
    """What the worker makes of one request's rounds: pieces of text, up to the first stop string."""

    def __init__(self, service: Service, ask: Ask) -> None:
        self.service, self.ask, self.stop = service, ask, StopText(ask.stops)
        self.stream: TextStream

    def open(self) -> tuple[Request | None, Refusal | Opened]:
        """What is to be decoded, and how many tokens the prompt has; or why nothing is."""
        try:
            prompt = _prompt(self.service, self.ask)
            limit = _limit(self.service, self.ask, len(prompt))
        except Refusal as refusal:
            return None, refusal
        before = prompt if self.ask.messages is None else []  # a completion goes on from its prompt's text
        hides = not self.ask.shows_special
        self.stream = TextStream(self.service.target.tokenizer, before, skip_special_tokens=hides)
        sampler = dataclasses.replace(self.service.sampler, **self.ask.sampling)
        return Request(prompt, sampler, limit), Opened(len(prompt))

    def feed(self, event: Round, last: bool) -> tuple[Piece, bool]:
        """What a round added, and whether the answer is done: at a stop string, or after its `last` round."""
        text, drafted = "", event.kind != "prefill"
        for count, token in enumerate(event.new_ids, start=1):
            text += self.stop.feed(self.stream.feed(self._shown(token)))
            if self.stop.hit:
                return Piece(text, count, drafted, "stop"), True
        if not last:
            return Piece(text, len(event.new_ids), drafted), False
        text += self.stop.feed(self.stream.rest())
        ended = self.stop.hit or event.new_ids[-1] in self.service.target.stop_ids
        text = text if self.stop.hit else text + self.stop.held
        return Piece(text, len(event.new_ids), drafted, "stop" if ended else "length"), True

    def _shown(self, token: int) -> list[int]:
        """The token, but for the one that ends an answer whose special tokens are shown."""
        return [] if self.ask.shows_special and token in self.service.target.stop_ids else [token]


def _prompt(service: Service, ask: Ask) -> list[int]:
    """The request's token ids. Raises Refusal."""
    tokenizer = service.target.tokenizer
    try:
        if ask.messages is not None:
            _refuse_taken(tokenizer, ask.variables)
            _refuse_unread(tokenizer, ask.messages, ask.variables)
            ids = prompt_ids(tokenizer, ask.messages, **ask.variables)
        else:
            ids = _text_ids(tokenizer, ask.text or "", ask.special) if ask.ids is None else ask.ids
        service.target.refuse_strange(ids)
    except DataError as error:
        raise Refusal(str(error), param="prompt" if ask.messages is None else "messages") from error
    return ids


def _text_ids(tokenizer: Any, text: str, special: bool | None) -> list[int]:
    """Ids of a text. With `special` None, the tokenizer's special tokens are not put before a text that begins with
    them, as one does that a client made by the chat template."""
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(text)["input_ids"]
    added = len(whole) - len(bare)
    there = whole[added:] == bare and bare[:added] == whole[:added]
    return bare if special is False or (special is None and there) else whole


def _refuse_taken(tokenizer: Any, variables: Collection[str]) -> None:
    """Raises Refusal for a variable that coral or transformers gives to the template."""
    taken = {*inspect.signature(render).parameters, *inspect.signature(tokenizer.apply_chat_template).parameters}
    if wrong := sorted(taken.intersection(variables)):
        where = f"chat_template_kwargs.{wrong[0]}"
        raise Refusal(f"{where} is not for a request to set; leave it out", param=where)


def _refuse_unread(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any]) -> None:
    """Raises Refusal for a field of a message that the chat template does not show, unless it is a note."""
    shown = shown_fields(tokenizer, messages, **variables)
    for place, message in enumerate(messages):
        if unread := sorted({*message} - {"role", "content"} - NOTES - shown):
            where = f"messages[{place}].{unread[0][:60]}"
            raise Refusal(f"the target's chat template does not show {where}; leave it out", param=where)


def _limit(service: Service, ask: Ask, prompt: int) -> int:
    """New tokens at most. Raises Refusal when prompt and answer do not fit the context."""
    context = service.target.max_positions
    wanted = ask.max_new_tokens or 1
    if prompt == 0 or prompt + wanted > context:
        asked = "" if ask.max_new_tokens is None else f", max_tokens is {wanted}"
        long = prompt == 0 or prompt >= context
        mend = "give another prompt" if long else f"ask for {context - prompt} tokens at most"
        raise Refusal(
            f"the prompt has {prompt} tokens{asked}, and the context holds {context}; {mend}",
            param=("prompt" if ask.messages is None else "messages") if long else "max_tokens",
            code="context_length_exceeded" if prompt else None,
        )
    return ask.max_new_tokens or min(service.max_new_tokens, context - prompt)
