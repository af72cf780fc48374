"""Counting what is done, for a Progress to show."""

import time

from coral_core.progress import Progress


class Meter:
    """Rows and tokens of one stage; its rate is of this run's work, not of what an earlier run had finished."""

    def __init__(self, progress: Progress, stage: str, total: int, done: int = 0) -> None:
        self.progress, self.stage, self.total, self.done = progress, stage, total, done
        self.tokens = 0
        self._begun_s = time.monotonic()
        progress(stage, done, total, {})

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second since the meter was made."""
        return self.tokens / max(time.monotonic() - self._begun_s, 1e-9)

    def advance(self, rows: int, tokens: int) -> None:
        """Count finished rows and written tokens. Only `finish` shows a full bar: rows may yet be thrown away."""
        self.done += rows
        self.tokens += tokens
        self.progress(self.stage, min(self.done, self.total - 1), self.total, {"tokens_per_s": self.tokens_per_s})

    def finish(self) -> None:
        """Show the stage as ended."""
        self.progress(self.stage, self.total, self.total, {"tokens_per_s": self.tokens_per_s} if self.tokens else {})
