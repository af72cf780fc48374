"""OpenAI's chat and completions API as values: requests read and checked, answers and errors written. No network here.

Fields and defaults as in https://platform.openai.com/docs/api-reference/chat and .../completions; `top_k`, `min_p` and
`repetition_penalty` are the extensions that vLLM knows too, and so are `chat_template_kwargs`, `add_special_tokens` and
`skip_special_tokens`. A field that would change the answer and is not known is refused: an answer that quietly ignores
what was asked is a wrong answer.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from coral_core.target.template import Message

MOST_STOPS = 4
"""Stop strings of one request, as OpenAI has it."""
MOST_STOP_CHARACTERS = 256

Fields = dict[str, Any]


class Refusal(Exception):  # noqa: N818 (the answer to a request, not a failure of ours)
    """A request that is answered with an error, in OpenAI's form."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A request that can be answered."""

    messages: list[Message] | None = None
    """A dialogue for the chat template; None for a completion."""
    variables: Fields = dataclasses.field(default_factory=dict)
    """What the client says to the template besides."""
    text: str | None = None
    """The prompt of a completion, or its token ids:"""
    ids: list[int] | None = None
    special: bool | None = None
    """Whether the tokenizer puts its special tokens before the text; None: unless they are there."""
    max_new_tokens: int | None
    """None: the recipe's."""
    sampling: dict[str, Any]
    """The Sampler's fields that the client gave."""
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    shows_special: bool = False
    """Whether the answer's text has its special tokens."""


def parse(body: bytes) -> Fields:
    """The JSON object in a request's body; fields that are null are as if absent. Raises Refusal."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text that a tokenizer can read
    except RecursionError:
        raise Refusal("the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise Refusal("the body holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise Refusal(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Refusal("the body must be a JSON object")
    return {name: field for name, field in value.items() if field is not None}


def read_chat(fields: Fields) -> Ask:
    """A body of /v1/chat/completions. Raises Refusal, naming the field."""
    _refuse_unknown(fields, {"messages", "max_completion_tokens", "chat_template_kwargs", "reasoning_effort"})
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal("'messages' must be a list with at least one message", param="messages")
    read = [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]
    limit = _given(fields, "max_completion_tokens", _whole(1)) or _given(fields, "max_tokens", _whole(1))
    return Ask(messages=read, variables=_variables(fields), max_new_tokens=limit, **_shared(fields))


def read_completion(fields: Fields) -> Ask:
    """A body of /v1/completions. Raises Refusal, naming the field."""
    _refuse_unknown(fields, {"prompt", "add_special_tokens"})
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    text = prompt if isinstance(prompt, str) else None
    ids = prompt if isinstance(prompt, list) and all(type(token) is int for token in prompt) else None
    if not text and not ids:
        raise Refusal("'prompt' must be one text, or one list of token ids, and not empty", param="prompt")
    special, limit = _given(fields, "add_special_tokens", _switch), _given(fields, "max_tokens", _whole(1))
    return Ask(text=text, ids=ids, special=special, max_new_tokens=limit, **_shared(fields))


def _shared(fields: Fields) -> Fields:
    """The fields of Ask that both kinds of request have."""
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise Refusal("'stream_options' must be an object such as {\"include_usage\": true}", param="stream_options")
    sampling = {name: _given(fields, name, check) for name, check in SAMPLING.items() if name in fields}
    if sampling.get("top_k") == -1:  # vLLM's word for off
        sampling["top_k"] = 0
    return {
        "sampling": sampling,
        "stops": _stops(fields.get("stop", [])),
        "stream": bool(_given(fields, "stream", _switch)),
        "include_usage": options.get("include_usage", False),
        "shows_special": _given(fields, "skip_special_tokens", _switch) is False,
    }


def _variables(fields: Fields) -> Fields:
    """What a chat template reads besides the messages."""
    variables = fields.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        rule = 'an object such as {"enable_thinking": false}'
        raise Refusal(f"'chat_template_kwargs' must be {rule}", param="chat_template_kwargs")
    effort = _given(fields, "reasoning_effort", lambda value: None if isinstance(value, str) else "a word")
    return variables if effort is None else {"reasoning_effort": effort} | variables


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise Refusal(f"{where} must be an object with 'role' and 'content'", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{where}.role is {_shown(role)}; it must be one of {', '.join(ROLES)}", param=f"{where}.role")
    given = {name: value for name, value in message.items() if value not in (None, [], {}, "")}
    return given | {"role": ROLES[role], "content": _text(message.get("content"), f"{where}.content")}


def _text(content: Any, where: str) -> str:
    """A text, or the texts of OpenAI's parts joined."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Refusal(f"{where} must be a text, or parts of type 'text'", param=where)
    return "".join(texts)  # type: ignore[arg-type]  # checked just now


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not fits or not all(isinstance(text, str) and 0 < len(text) <= MOST_STOP_CHARACTERS for text in stops):
        rule = f"one text or up to {MOST_STOPS}, of 1 to {MOST_STOP_CHARACTERS} characters"
        raise Refusal(f"'stop' must be {rule}", param="stop")
    return tuple(stops)


# ---- fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _number(low: float, high: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if ok else f"a number from {low:g} to {high:g}"

    return check


def _whole(low: int, high: int = 2**31) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if type(value) is int and low <= value <= high else f"a whole number from {low} to {high}"

    return check


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _given(fields: Fields, name: str, check: Callable[[Any], str | None]) -> Any:
    """The field's value, or None when it is absent."""
    if name not in fields:
        return None
    if (rule := check(fields[name])) is not None:
        raise Refusal(f"'{name}' is {_shown(fields[name])}; it must be {rule}", param=name)
    return fields[name]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_unknown(fields: Fields, own: set[str]) -> None:
    if not isinstance(fields.get("model"), str):
        raise Refusal("'model' must be the name of a model; GET /v1/models lists them", param="model")
    for name, value in fields.items():
        if name in own:
            continue
        if name in NEUTRAL:
            if not any(value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in NEUTRAL[name]):
                raise Refusal(f"'{name}' is {_shown(value)}, which coral cannot do; leave it out", param=name)
        elif name not in KNOWN:
            raise Refusal(f"unknown field '{name[:60]}'; {_mend(name[:60], own)}", param=name[:60])


def _mend(name: str, own: set[str]) -> str:
    near = difflib.get_close_matches(name, {*KNOWN, *own, *NEUTRAL}, n=1)
    return f"did you mean '{near[0]}'?" if near else "leave it out"


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

SAMPLING: dict[str, Callable[[Any], str | None]] = {
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "top_k": _whole(-1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(1e-2, 10),
    "seed": _whole(-(2**63), 2**63 - 1),
}
"""The Sampler's fields, by name."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_special_tokens": (False,),  # of a chat, whose template writes its own
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
}
"""Fields that coral does not have, with the values that ask for nothing. 0 is not False: `logprobs: 0` of a completion
asks for the chosen tokens' own."""

WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("verbosity", "prediction"),  # OpenAI's own models read the first; the second is for speed alone
    *("request_id", "priority", "cache_salt", "cache_prompt"),  # of vLLM and llama.cpp
}
"""Fields that do not change an answer; they are accepted and not read."""

KNOWN = {"model", "max_tokens", "stop", "stream", "stream_options", "skip_special_tokens"}
KNOWN |= WITHOUT_EFFECT | set(SAMPLING)

NOTES = {
    *("name", "id", "index", "annotations", "metadata", "created", "created_at", "timestamp"),
    *("cache_control", "opts"),  # of Anthropic's clients, of CodeCompanion
}
"""Fields of a message that are left to the template. Any other that it does not show may say something, such as
`tool_calls`, or ask for another answer, such as `prefix`: the request is refused."""


# ---- answers


@dataclasses.dataclass
class Usage:
    """Tokens of one answer, and the rounds they took."""

    prompt_tokens: int
    new_tokens: int = 0
    rounds: int = 0
    round_tokens: int = 0

    def add(self, tokens: int, drafted: bool) -> None:
        """Count a piece."""
        self.new_tokens += tokens
        if drafted:
            self.rounds += 1
            self.round_tokens += tokens

    def shown(self) -> Fields:
        """OpenAI's object; `tokens_per_round` (tau) is coral's own."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "rounds": self.rounds,
            "tokens_per_round": round(self.round_tokens / self.rounds, 3) if self.rounds else None,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How the answers to one request are written: what is the same in all of its objects."""

    chat: bool
    id: str
    created: int
    model: str
    fingerprint: str
    seed: int
    """Of the draws: what the client gave, or what was drawn for it. With it, the request is answered alike again."""

    def whole(self, text: str, finish: str, usage: Usage) -> Fields:
        """The answer in one object."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._object("chat.completion" if self.chat else "text_completion", said, finish) | {
            "usage": usage.shown()
        }

    def chunk(self, text: str, finish: str | None, *, first: bool = False) -> Fields:
        """One event of a stream; the first of a chat names the role."""
        role = {"role": "assistant"} if first else {}
        said: Fields = {"delta": role | ({"content": text} if text or first else {})} if self.chat else {"text": text}
        return self._object("chat.completion.chunk" if self.chat else "text_completion", said, finish)

    def usage(self, usage: Usage) -> Fields:
        """The event that ends a stream whose client asked for the usage."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(kind, {}, None) | {"choices": [], "usage": usage.shown()}

    def _object(self, kind: str, said: Mapping[str, Any], finish: str | None) -> Fields:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}],
        }
