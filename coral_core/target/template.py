"""A dialogue as the target sees it, and which of its tokens the target wrote: both from the chat template alone.

No rule here knows a model family. A template with generation tags marks the answers itself (published ones also enclose
the header or a newline after the end, or leave out the end: that is put right); for any other, an answer is what
`messages[:i + 1]` has beyond the generation prompt of `messages[:i]`, and the one must begin with the other, token for
token, or nothing is learnt from it.

Axes: T position, I input width: the taps and the feature, side by side.
"""

import dataclasses
import datetime
import functools
import html
import itertools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from coral_core.errors import DataError, first_line

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}, and fields that the template may read besides."""

FOLDER = Path(__file__).parent / "templates"
NAMED = ("chatml", "llama-2", "vicuna", "plain")
"""Templates that ship with coral, FOLDER/NAME.jinja: `target.chat_template` names them (named_templates.py)."""
OFFER = "chatml, llama-2, vicuna, a file of Jinja, or plain, which continues a text without turns"
KNOWN = ("vicuna",)
"""Chat models whose tokenizers were published without a template: a part of their name is the template's."""

SENTINEL = "3f9ac1e07b52"
"""A text that no template contains, put where a message's words go."""

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PRINTED_PART = re.compile(r"""["']type["']: """)
DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
SWITCH = re.compile(r"(?:^|(?<=\s))/\w+")
TAG = re.compile(r"</?[\w-]+>")
REASONED = "<think>\n.\n</think>\n\n<thought>\n.\n</thought>\n\n<answer>\n.\n</answer>"
"""An answer with reasoning, in the tags of Qwen3, EXAONE-Deep and Hunyuan."""
PROMPT_VARIABLES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False})
"""An empty think block belongs to the prompt, not to the answer: the longest generation prompt that agrees has it."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One answer: what the target had read before it, and what it wrote."""

    prompt: list[int]
    answer: list[int]
    given_TI: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    """What the target gave at each token of both, where it was kept."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether the target wrote it."""

    ids: list[int]
    answer: list[bool]
    given_TI: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    """What the target gave at each token when it wrote the last answer (`Target.forward`), where it was kept."""


@dataclasses.dataclass(frozen=True)
class UserTurn:
    """How the template opens and closes a user's turn."""

    header: list[int]
    """Token ids before the words; trailing spaces are left off, since words bring their own."""
    stop_ids: frozenset[int]
    """Special tokens that end the words; empty for a template that ends them with plain text."""
    stop_text: str
    """What follows the words, as text."""


def prompt_ids(
    tokenizer: Any, messages: Sequence[Message], now: datetime.datetime | None = None, **variables: Any
) -> list[int]:
    """Ids of a dialogue up to where the target begins its answer. Raises DataError when the template refuses it.

    `now` is the time that a template with a date shows; None is the clock's. `variables` are what the template reads
    besides, such as `enable_thinking`.
    """
    return text_ids(tokenizer, render(tokenizer, messages, generation_prompt=True, now=now, **variables))


def encode(
    tokenizer: Any, messages: Sequence[Message], stop_ids: Collection[int], now: datetime.datetime | None = None
) -> list[Encoded]:
    """Ids and answer mask of a dialogue with given answers; each answer goes up to its first stop id, included.

    One Encoded, or several where the template shows earlier turns differently later (it drops their reasoning): then
    each answer is learnt in the context that the target would really have had. Raises DataError, naming the
    template, when the answers' tokens cannot be told or there are none.
    """
    now = now or datetime.datetime.now()  # one for all renderings, which are compared: a date may change between two
    if GENERATION_TAG.search(template_of(tokenizer)):
        pieces = [_encode_tagged(tokenizer, messages, stop_ids, now)]
    else:
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        pieces = join([_turn(tokenizer, messages[: place + 1], stop_ids, now) for place in places])
    if not any(any(piece.answer) for piece in pieces):
        raise DataError(
            f"the chat template of {_name(tokenizer)} marks no token of a dialogue as the target's: "
            "there is nothing to learn from. Set data.regenerate=greedy, or mend the template"
        )
    return pieces


def join(turns: Sequence[Turn]) -> list[Encoded]:
    """Turns of one dialogue as one sequence, cut where a prompt does not begin with all that was there before."""
    pieces: list[Encoded] = []
    for turn in turns:
        append(pieces, turn)
    return pieces


def append(pieces: list[Encoded], turn: Turn) -> None:
    """One turn more. Of a sequence that it goes on from, only its own features are kept: they are of all tokens."""
    last = pieces[-1] if pieces else None
    if last and turn.prompt[: len(last.ids)] == last.ids:
        answer = last.answer + [False] * (len(turn.prompt) - len(last.ids))
        pieces.pop()
    else:
        answer = [False] * len(turn.prompt)
    pieces.append(Encoded(turn.prompt + turn.answer, answer + [True] * len(turn.answer), turn.given_TI))


def keeps_turns(tokenizer: Any, stop_ids: Collection[int]) -> bool:
    """Whether the template shows an earlier answer as it was written, reasoning included.

    `join` then makes one sequence of a dialogue, but for the rare answer whose text has other tokens when cut anew.
    """
    user, words = {"role": "user", "content": "."}, REASONED
    now = datetime.datetime.now()
    written = prompt_ids(tokenizer, [user], now) + text_ids(tokenizer, words) + closing_ids(tokenizer, stop_ids)
    later = prompt_ids(tokenizer, [user, {"role": "assistant", "content": words}, user], now)
    return later[: len(written)] == written


def user_turn(tokenizer: Any) -> UserTurn:
    """What surrounds a user's first words, so that a target can be asked to write them. Raises DataError."""
    text = render(tokenizer, [{"role": "user", "content": SENTINEL}], generation_prompt=True)
    if text.count(SENTINEL) != 1:
        raise DataError(
            f"the chat template of {_name(tokenizer)} shows a user's words {text.count(SENTINEL)} times, so its target "
            "cannot write prompts. Set data.prompts to a file or a Hub dataset"
        )
    header, tail = text.split(SENTINEL)
    if not tail.strip():
        raise DataError(
            f"the chat template of {_name(tokenizer)} puts nothing after a user's words, so its target cannot write "
            "prompts: they would not end. Set data.prompts to a file or a Hub dataset"
        )
    opening = text_ids(tokenizer, header.rstrip(" "))
    if not opening:
        raise DataError(
            f"the chat template of {_name(tokenizer)} puts nothing before a user's words, so its target cannot write "
            "prompts: there is nothing to continue. Set data.prompts to a file or a Hub dataset"
        )
    first = text_ids(tokenizer, tail.lstrip())[:1]
    stop_ids = control_ids(tokenizer).intersection(first)
    return UserTurn(opening, stop_ids, tail.strip())


def closing_ids(tokenizer: Any, stop_ids: Collection[int]) -> list[int]:
    """The stop id with which the target ends an answer, as the template ends one; none where there is no stop id."""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": SENTINEL}]
    tail = text_ids(tokenizer, render(tokenizer, messages).rpartition(SENTINEL)[2])
    return [*(token for token in tail if token in stop_ids), *sorted(stop_ids)][:1]


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for no text of a language: those added to the vocabulary, runs of spaces excepted."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.content.strip())


def hides(tokenizer: Any, ids: Sequence[int], stop_ids: Collection[int]) -> bool:
    """Whether an answer's text lacks special tokens that it holds before its end. What they part, as gpt-oss's channels
    part reasoning and answer, runs together in the text, which is not what the template shows of an earlier answer."""
    said = [token for token in ids if token not in stop_ids]
    whole, text = (tokenizer.decode(said, skip_special_tokens=skip) for skip in (False, True))
    return bool(whole != text)


def takes_system(tokenizer: Any, *, answered: bool) -> bool:
    """Whether the template shows a system message (Gemma's raises, some drop it) in a prompt; with `answered`, in a
    dialogue that ends in an answer, too. Mistral-7B-Instruct-v0.3's shows it in a last message of a user alone."""
    system, user, answer = ({"role": role, "content": "."} for role in ("system", "user", "assistant"))
    system["content"] = SENTINEL
    try:
        for dialogue in ([user], [user, answer, user], *([[user, answer]] if answered else [])):
            render(tokenizer, [system, *dialogue])
    except DataError:
        return False
    return True


def shown_fields(tokenizer: Any, messages: Sequence[Message], **variables: Any) -> frozenset[str]:
    """The fields beside role and content that the template shows: without one, its text is another."""
    names = {name for message in messages for name in message} - {"role", "content"}
    template = template_of(tokenizer)
    named = {name for name in names if re.search(rf"\b{re.escape(name)}\b", template)}
    if not named:
        return frozenset()
    now = datetime.datetime.now()
    whole = render(tokenizer, messages, now=now, **variables)

    def without(name: str) -> list[Message]:
        return [{key: value for key, value in message.items() if key != name} for message in messages]

    return frozenset(name for name in named if render(tokenizer, without(name), now=now, **variables) != whole)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    generation_prompt: bool = False,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> str:
    """The template's text. Raises DataError, in the template's own words, when it refuses the dialogue, and when a
    message's words are not in its text."""
    variables["add_generation_prompt"] = generation_prompt
    text: str = _applied(tokenizer, _formed(tokenizer, messages), now, tokenize=False, **variables)
    shown = _bare(text + html.unescape(text))
    for place, message in enumerate(messages):
        if not _shows(shown, message):
            raise DataError(
                f"the chat template of {_name(tokenizer)} leaves out the words of message {place + 1} "
                f"(role {message['role']}): the target would never read them. Leave it out, or mend the template"
            )
    return text


def _applied(tokenizer: Any, messages: Sequence[Message], now: datetime.datetime | None, **options: Any) -> Any:
    """What `apply_chat_template` returns. Raises DataError when the template refuses the dialogue."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=_at(now or datetime.datetime.now(), template_of(tokenizer)),
            **options,
        )
    except DataError:
        raise
    except Exception as error:  # of Jinja, or of the template's own arithmetic
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the chat template of {_name(tokenizer)} refuses a dialogue: {reason}") from error


def _at(now: datetime.datetime, template: str) -> str:
    """A template with its dates written out: transformers asks the clock anew for each rendering."""
    return DATE.sub(lambda call: repr(now.strftime(call["format"])), template)


# ---- a message's words: handed over in the form that the template takes, and looked for in its text


def _formed(tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, with texts as lists of one part where the template takes them so. Raises DataError for a message
    of a role that it leaves out."""
    forms = {role: _form(tokenizer, template_of(tokenizer), role) for role in {message["role"] for message in messages}}
    if left_out := [role for role, form in forms.items() if form == "left out"]:
        raise DataError(
            f"the chat template of {_name(tokenizer)} leaves out the words of messages of the role {left_out[0]}: the "
            "target would never read them. Leave such messages out, or mend the template"
        )
    return [_in_parts(message) if forms[message["role"]] == "parts" else message for message in messages]


@functools.lru_cache(maxsize=16)
def _form(tokenizer: Any, template: str, role: str) -> str:
    """How a template takes the content of a role: "text", "parts" or, where it shows neither, "left out".

    One that refuses both is "text": what it says of a dialogue is told when it refuses that.
    """
    message = {"role": role, "content": SENTINEL}
    user = {"role": "user", "content": "."}
    dialogue = {"system": [message, user], "assistant": [user, message]}.get(role, [message])
    refused = False
    for form in ("text", "parts"):
        formed = dialogue if form == "text" else [_in_parts(message) for message in dialogue]
        try:
            text = _applied(tokenizer, formed, None, tokenize=False)
        except DataError:
            refused = True
            continue
        printed = form == "parts" and PRINTED_PART.search(text)  # the list itself, as Python writes it
        if SENTINEL in text.casefold() and not printed:
            return form
    return "text" if refused else "left out"


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _shows(shown: str, message: Message) -> bool:
    """Whether a text, `_bare`, holds a message's words, however they are spaced, cased or escaped.

    A template may leave out an answer's reasoning, and the tags around the rest (EXAONE-Deep's </thought>, Hunyuan's
    <answer>), so that only the end of an answer is looked for, behind its last tag; and switches of the kind of
    /no_think, so that words that begin with a slash are not.
    """
    content = message["content"]
    if not isinstance(content, str):
        return True
    if message["role"] == "assistant":
        pieces = TAG.split(content.rpartition("</think>")[2])
        content = next((piece for piece in reversed(pieces) if piece.strip()), "")
    as_json = (json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
    for words in map(_bare, (content, *as_json)):
        if (words[-64:] if message["role"] == "assistant" else words) in shown:
            return True
    return all(_bare(piece) in shown for piece in SWITCH.split(content))


def _bare(text: str) -> str:
    """A text without spaces and capitals."""
    return "".join(text.split()).casefold()


def _turn(tokenizer: Any, messages: Sequence[Message], stop_ids: Collection[int], now: datetime.datetime) -> Turn:
    """The last message as the target's answer to those before it, by prefix differencing."""
    whole = text_ids(tokenizer, render(tokenizer, messages, now=now))
    prompts = []
    for variables in PROMPT_VARIABLES:
        prompt = text_ids(tokenizer, render(tokenizer, messages[:-1], generation_prompt=True, now=now, **variables))
        if whole[: len(prompt)] == prompt:
            prompts.append(prompt)
    if not prompts:
        raise DataError(
            f"the chat template of {_name(tokenizer)} has no generation tags, and an answer does not begin with its "
            "generation prompt, so the answer's tokens cannot be told. Set data.regenerate=greedy, or mend the template"
        )
    prompt = max(prompts, key=len)
    return Turn(prompt, _until_stop(whole[len(prompt) :], stop_ids))


def _encode_tagged(
    tokenizer: Any, messages: Sequence[Message], stop_ids: Collection[int], now: datetime.datetime
) -> Encoded:
    render(tokenizer, messages, now=now)  # refuses what leaves out words
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _applied(tokenizer, _formed(tokenizer, messages), now, **options)
    ids, answer = list(encoded["input_ids"]), [False] * len(encoded["input_ids"])
    headers = _headers(tokenizer, messages[: 1 if messages[0]["role"] == "user" else 2], now)
    at = 0
    for marked, run in itertools.groupby(encoded["assistant_masks"]):
        first, at = at, at + len(list(run))
        if marked:
            first += max(len(header) for header in headers if ids[first : first + len(header)] == header)
            written = _until_stop(ids[first : at + 1], stop_ids)
            last = first + len(written) if written and written[-1] in stop_ids else at
            answer[first:last] = [True] * (last - first)
    return Encoded(ids, answer)


def _headers(tokenizer: Any, messages: Sequence[Message], now: datetime.datetime) -> list[list[int]]:
    """What the template puts between the user's turn and an answer; the first is empty."""
    headers: list[list[int]] = [[]]
    for variables in PROMPT_VARIABLES:
        before, after = (
            render(tokenizer, messages, generation_prompt=flag, now=now, **variables) for flag in (False, True)
        )
        headers.append(text_ids(tokenizer, after[len(before) :] if after.startswith(before) else ""))
    return headers


def _until_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    """Up to the first stop id, included: what the target itself writes before it is stopped."""
    for place, token in enumerate(ids):
        if token in stop_ids:
            return ids[: place + 1]
    return ids


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a template's text, or of an answer: they carry their own special tokens, and none are added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def template_of(tokenizer: Any) -> str:
    """The chat template. Raises DataError when the tokenizer has no chat template, and none is known for its name."""
    if tokenizer.chat_template:
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them is called default
            raise DataError(
                f"the tokenizer of {_name(tokenizer)}: {first_line(error)}. Set target.chat_template"
            ) from error
        return template
    return known(str(tokenizer.name_or_path))


def known(model: str) -> str:
    """The template of a model that was published without one. Raises DataError when none is known for its name."""
    for name in KNOWN:
        if name in model.lower():
            return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    raise DataError(
        f"the tokenizer of {_quoted(model)} has no chat template. Set target.chat_template to {OFFER}; or "
        "target.model to a chat model"
    )


def _name(tokenizer: Any) -> str:
    return _quoted(str(tokenizer.name_or_path))


def _quoted(model: str) -> str:
    return repr(model or "the target")
