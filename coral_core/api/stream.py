"""Token ids into text as they arrive."""

from typing import Any


class TextStream:
    """Emits text only once it can no longer change: a character cut between tokens waits for its rest."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self._ids: list[int] = []
        """Ids of the current line: decoding restarts at line ends, so that long answers stay linear."""
        self._emitted = ""

    def feed(self, new_ids: list[int]) -> str:
        """The text that `new_ids` complete."""
        self._ids += new_ids
        whole = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole.endswith("\ufffd"):
            return ""
        return self._emit(whole)

    def rest(self) -> str:
        """What is left at the end of the answer, broken characters included."""
        return self._emit(self.tokenizer.decode(self._ids, skip_special_tokens=True))

    def _emit(self, whole: str) -> str:
        new = whole[len(self._emitted) :]
        self.text += new
        self._emitted = whole
        if new.endswith("\n"):
            self._ids, self._emitted = [], ""
        return new
