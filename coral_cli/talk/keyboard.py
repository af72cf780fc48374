"""Lines from the user, and Ctrl-C while an answer is told."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

Item = TypeVar("Item")


def prepare() -> None:
    """Line editing and history where there is someone to use them; bytes that are no text become a sign for it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if _edited():
        with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # `input` uses it once it is loaded

            # A pasted text of several lines is one message. Python turns this off for its own prompt.
            readline.parse_and_bind("set enable-bracketed-paste on")


def _edited() -> bool:
    """Whether `input` edits lines: it does so on a terminal only."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_line() -> str | None:
    """The next line; None at the end of the input. On a terminal Ctrl-C only clears the line."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        sys.stderr.write("\n")
        if _edited():
            return input("> ")
        sys.stderr.write("> ")  # stdout is the answer, and goes elsewhere
        sys.stderr.flush()
        return sys.stdin.readline() or None
    except EOFError:
        sys.stderr.write("\n")
        return None
    except KeyboardInterrupt:
        sys.stderr.write("\n(/exit or Ctrl-D leaves)\n")
        return ""


class Interrupts:
    """Ctrl-C within a `with`: it breaks into the model's work, and waits for drawing to be whole.

    Only the first one does; whoever presses the key twice shall not leave the chat by it.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._working = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        again, self.pressed = self.pressed, True
        if self._working and not again:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The model's work: within it, Ctrl-C raises KeyboardInterrupt."""
        self._working = True
        try:
            yield
        finally:
            self._working = False

    def each(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass on what the model's work yields."""
        while True:
            with self.working():
                item = next(items, None)
            if item is None:
                return
            yield item


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Every key is kept for the line editor, also one that is pressed before it is there.

    The editor takes keys one by one; a terminal that still gathers lines when it begins swallows a Ctrl-D.
    """
    if not _edited():
        yield
        return
    with _without("ICANON"):
        yield


@contextlib.contextmanager
def unechoed() -> Iterator[None]:
    """What is typed while an answer is drawn must not be mixed into it; it is kept for the next line.

    For the answer only: the line editor echoes nothing where it finds the terminal so.
    """
    with _without("ECHO"):
        yield


@contextlib.contextmanager
def _without(flag: str) -> Iterator[None]:
    try:
        import termios

        before = termios.tcgetattr(sys.stdin.fileno())
    except (ImportError, OSError, ValueError, termios.error):  # no terminal, or none of this kind
        yield
        return
    changed = before.copy()
    changed[3] &= ~getattr(termios, flag)
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
