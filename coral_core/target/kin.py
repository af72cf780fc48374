"""What a target has in common with its fine-tunes and its quantised forms, for the drafters that serve them all."""

import hashlib
from typing import Any

from coral_core.errors import DataError
from coral_core.lent import Lent
from coral_core.target.template import SENTINEL, render

SPECIAL = set("<>[]|｜")
"""Characters of special tokens and of fillers ([PAD7]), which differ between a model's forms."""


def describe(lent: Lent, tokenizer: Any) -> dict[str, Any]:
    """`tokenizer` and `template` are hashes, `vocabulary` and `hidden` the shape of the LM head."""
    vocabulary, hidden = lent.head_VD.shape
    return {
        "tokenizer": "" if tokenizer is None else _hash(_words(tokenizer)),
        "template": "" if tokenizer is None else _turns(tokenizer),
        "vocabulary": vocabulary,
        "hidden": hidden,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _words(tokenizer: Any) -> str:
    """Every token with its id, but for special ones."""
    vocabulary = tokenizer.get_vocab().items()
    return "\n".join(sorted(f"{token} {number}" for token, number in vocabulary if SPECIAL.isdisjoint(token)))


def _turns(tokenizer: Any) -> str:
    """A hash of what the template puts around a later question: forms of a model may begin with other system messages.

    '' where there is no template, or it refuses.
    """
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"{SENTINEL}{index}"} for index, role in enumerate(roles)]
    try:
        text = render(tokenizer, messages, generation_prompt=True)
    except DataError:
        return ""
    return _hash(text[text.find(messages[1]["content"]) :])
