"""Dialogues out of rows: the forms in which people keep them, what cannot be used and why.

A row may hold `messages` (role, content), `conversations` (ShareGPT's from, value), `turns` (what the user says, turn
after turn), or `prompt`. What is no dialogue, or one that nothing can be learnt from, is skipped and counted.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from coral_core.data.sources import MalformedError
from coral_core.target.template import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""The names people give the three roles."""


OWN = ("role", "from", "content", "value")
EMPTY: tuple[Any, ...] = (None, "", [], {})
ROW_FIELDS = ("tools", "functions", "documents", "chat_template_kwargs")
"""Fields of a row that other trainers hand to the chat template, and coral does not."""


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """What a user says, turn after turn, and the answers where they are given."""

    users: tuple[str, ...]
    answers: tuple[str, ...] = ()
    system: str = ""
    fields: tuple[dict[str, Any], ...] = ()
    """What the messages hold besides role and text, in their order, system first; () where none holds anything."""

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """The dialogue with these answers, up to the words of the user who has none yet, if there is one."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn, words in enumerate(self.users[: len(answers) + 1]):
            found.append({"role": "user", "content": words})
            if turn < len(answers):
                found.append({"role": "assistant", "content": answers[turn]})
        fields = (*self.fields, *({} for _ in found))
        return [own | message for own, message in zip(fields, found, strict=False)]

    def unanswered(self) -> "Dialogue":
        """The same without the answers, and what their messages hold."""
        first = 1 if self.system else 0
        kept = ({} if place % 2 != first % 2 and place >= first else fields for place, fields in enumerate(self.fields))
        return dataclasses.replace(self, answers=(), fields=_unless_empty(kept))

    def with_fields(self, names: Collection[str]) -> "Dialogue":
        """The same, with these of the fields alone."""
        kept = ({name: value for name, value in one.items() if name in names} for one in self.fields)
        return dataclasses.replace(self, fields=_unless_empty(kept))

    def folded(self) -> "Dialogue":
        """The system message put before the user's first words, for a template that takes none."""
        if not self.system:
            return self
        first = f"{self.system}\n\n{self.users[0]}"
        return dataclasses.replace(self, users=(first, *self.users[1:]), system="", fields=self.fields[1:])

    def to_row(self) -> dict[str, Any]:
        """A row that `parse` reads back."""
        row: dict[str, Any] = {"turns": list(self.users)}
        return (
            row
            | ({"answers": list(self.answers)} if self.answers else {})
            | ({"system": self.system} if self.system else {})
            | ({"fields": list(self.fields)} if self.fields else {})
        )


@dataclasses.dataclass
class Skipped:
    """Why rows were left out: how many for each reason, and where the first of them is."""

    reasons: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    unread: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """Fields that were left out of rows which are used."""

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """Count rows."""
        before, first = self.reasons.get(reason, (0, where))
        self.reasons[reason] = (before + count, first)

    def leave_out(self, field: str, where: str) -> None:
        """Count a row whose field is not read."""
        before, first = self.unread.get(field, (0, where))
        self.unread[field] = (before + 1, first)

    def __str__(self) -> str:
        parts = [f"{count} {reason} (first: {where})" for reason, (count, where) in self.reasons.items()]
        return "; ".join(parts)


class UnusableError(Exception):
    """A row that is whole, but that nothing can be learnt from; its text is the reason."""


def parse(row: Any, where: str) -> Dialogue:
    """A row as a dialogue. Raises MalformedError naming `where`, or UnusableError when it is whole but no use."""
    if isinstance(row, MalformedError):
        raise row
    if not isinstance(row, dict):
        raise MalformedError(where, f"is {_kind(row)}, not an object with messages, conversations, turns or prompt")
    for key in ("messages", "conversations", "conversation"):
        if row.get(key) is not None:
            return _alternate(_listed(row[key], f"{where}: {key}"), row.get("system"))
    if row.get("turns") is not None:
        users, answers = _texts(row["turns"], f"{where}: turns"), _texts(row.get("answers") or [], f"{where}: answers")
        fields: Any = row.get("fields")
        ours = isinstance(fields, list) and all(isinstance(one, dict) for one in fields)
        return _checked(users, answers, row.get("system"), fields if ours else ())
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _alternate(_listed(prompt, f"{where}: prompt"), row.get("system"))
    if isinstance(prompt, str):
        return _checked([prompt], [], row.get("system"))
    if prompt is not None:
        raise MalformedError(where, f"has {_kind(prompt)} for its prompt, not a text or a list of messages")
    keys = ", ".join(map(str, row)) or "none"
    raise MalformedError(where, "has no messages, conversations, turns or prompt", f" (its keys: {keys})")


@dataclasses.dataclass(frozen=True)
class _Message:
    role: str
    text: str
    fields: dict[str, Any]
    """What it holds besides, and is not empty."""


def _listed(messages: Any, where: str) -> list[_Message]:
    """A list of messages in OpenAI's or ShareGPT's words."""
    if not isinstance(messages, list):
        raise MalformedError(where, f"is {_kind(messages)}, not a list")
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise MalformedError(f"{where}, message {number}", f"is {_kind(message)}, not an object")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise MalformedError(f"{where}, message {number}", "has no role (or from)")
        if role not in ROLES:
            raise UnusableError("with a message by none of system, user and assistant")
        rest = {str(key): value for key, value in message.items() if key not in OWN and value not in EMPTY}
        found.append(_Message(ROLES[role], _text(content, f"{where}, message {number}"), rest))
    return found


def _text(content: Any, where: str) -> str:
    """Text, or the parts of a message that are all text."""
    if content is None:
        raise UnusableError("with a message that has no text")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UnusableError("with a message that is not text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise MalformedError(where, f"has {_kind(content)} for its text")
    return content


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise MalformedError(where, "is not a list of texts")
    return values


def _alternate(messages: list[_Message], system: Any) -> Dialogue:
    """Messages as a dialogue: system first if at all, then user and assistant by turns."""
    fields = [message.fields for message in messages]
    if messages and messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
        fields = fields if system.strip() else fields[1:]
    elif isinstance(system, str) and system.strip():
        fields = [{}, *fields]
    if any(message.role != ("user", "assistant")[place % 2] for place, message in enumerate(messages)):
        raise UnusableError("whose roles are out of order")
    texts = [message.text for message in messages]
    return _checked(texts[::2], texts[1::2], system, fields)


def _unless_empty(fields: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    kept = tuple(fields)
    return kept if any(kept) else ()


def _checked(users: list[str], answers: list[str], system: Any, fields: Sequence[dict[str, Any]] = ()) -> Dialogue:
    """A last answer that is empty is one not given yet; any other empty text spoils the dialogue."""
    users, answers = [text.strip() for text in users], [text.strip() for text in answers]
    if answers and not answers[-1]:
        answers.pop()
    if not users:
        raise UnusableError("without a word of a user")
    if not all(users) or not all(answers):
        raise UnusableError("with an empty message")
    if len(answers) > len(users) or 0 < len(answers) < len(users) - 1:
        raise UnusableError("whose answers do not match its turns")
    system = system.strip() if isinstance(system, str) else ""
    dialogue = Dialogue(tuple(users), tuple(answers), system, _unless_empty(fields))
    try:
        "".join([*users, *answers, dialogue.system, str(dialogue.fields)]).encode()
    except UnicodeEncodeError:
        raise UnusableError("with half of a Unicode pair") from None
    return dialogue


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {"NoneType": "null", "list": "a list", "str": "a text", "dict": "an object", "bool": "a truth value"}
    return names.get(type(value).__name__, "a number")
