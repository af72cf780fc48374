"""Token ids into text as they arrive: the pieces, joined, are what the tokenizer decodes from all the ids, or what that
has beyond the text of the ids that came before.

A decoder's text for a token may depend on the tokens around it: the first space of all is stripped (Llama-2), a
character is spread over several tokens, a run of byte tokens with one wrong byte becomes replacement characters as a
whole. So only text that later tokens cannot change is emitted, and a window of recent tokens is decoded, whose first
ones were emitted before and are there for the others' sake. tokenizers' own DecodeStream does not keep a run of bytes
back, and raises where the text of its prefix changes.
"""

import re
from collections.abc import Sequence
from typing import Any

CONTEXT, WINDOW = 8, 64
"""Emitted tokens that stay in the window as context when it has grown to WINDOW tokens."""
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""How sentencepiece writes a token that is one byte."""


class TextStream:
    """The text of one answer, piece by piece, in time linear in its tokens."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        """`before` are the ids that the answer goes on from and whose text is known; none for an answer that begins
        a text of its own."""
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.text = ""
        self._ids = list(before[self._first(before) :])
        known = self._decode(self._ids)
        self._shown = _unbroken(known)
        """Characters of the window's text that were emitted, or known before."""
        self._limit = WINDOW
        self._in_bytes = False
        """Whether the last token that has a text is a byte: the whole run of bytes may still change."""
        self._by_line = _cleans_up(tokenizer)

    def feed(self, new_ids: list[int]) -> str:
        """The text that `new_ids` complete."""
        self._ids += new_ids
        for token in new_ids:
            self._in_bytes = self._is_byte(token) or (self._in_bytes and not self._decode([token]))
        if self._in_bytes:
            return ""
        whole = self._decode(self._ids)
        text = self._emit(whole, self._settled(whole))
        if len(self._ids) >= self._limit:
            self._move(whole)
        return text

    def rest(self) -> str:
        """What is left at the end of the answer, broken characters included."""
        whole = self._decode(self._ids)
        return self._emit(whole, len(whole))

    def _settled(self, whole: str) -> int:
        """Characters that later tokens cannot change."""
        if self._by_line:  # what is cleaned up, such as the space in " .", never reaches over a line's end
            return max(self._shown, whole.rfind("\n") + 1)
        return _unbroken(whole)

    def _emit(self, whole: str, end: int) -> str:
        text = whole[self._shown : end]
        self._shown = max(self._shown, end)
        self.text += text
        return text

    def _move(self, whole: str) -> None:
        """Begin the window later, where its text is then the end of what it was; else try again at twice the size."""
        first = self._first(self._ids)
        kept = self._decode(self._ids[first:])
        hidden = len(whole) - len(kept)
        if whole.endswith(kept) and hidden <= self._shown:
            self._ids, self._shown = self._ids[first:], self._shown - hidden
        self._limit = max(WINDOW, 2 * len(self._ids))

    def _first(self, ids: Sequence[int]) -> int:
        """Where a window of the last ids can begin: a run of bytes is not cut, and the space that is stripped from the
        first text is none of a later one's."""
        first = max(0, len(ids) - CONTEXT)
        while first > 0 and (self._is_byte(ids[first]) or not self._decode([ids[first]])):
            first -= 1
        return first

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens))

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(token) or "") is not None


def _unbroken(text: str) -> int:
    """Characters without a broken one at the end, which a token to come may complete; it lacks three bytes at most."""
    broken = len(text) - len(text.rstrip("\ufffd"))
    return len(text) - min(broken, 3)


def _cleans_up(tokenizer: Any) -> bool:
    """Whether `decode` takes out the spaces before punctuation; transformers never does for a tokenizer of BPE."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and type(model).__name__ != "BPE"
