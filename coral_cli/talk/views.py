"""How an answer is shown while it comes: plain in a pipe, Markdown on a terminal, or coloured by how it was drafted."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Protocol

from rich.cells import cell_len
from rich.markdown import Markdown
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from coral_cli.talk.session import Piece

REDRAW_S = 0.07
"""Seconds between two drawings of what is still changing, at least."""
DRAWING_SHARE = 0.1
"""Of the time, drawing takes no more: a tall block on a slow machine is drawn less often."""
DEPTHS = ("#000000 on #ffe3c2", "#000000 on #ffc48f", "#000000 on #ff9e6b", "#ffffff on #c8452b", "#ffffff on #8a2a3f")
"""Styles of drafted tokens by depth, the last for all deeper ones; they bring their own ground, so that they read on a
light and on a dark terminal."""

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_CONTROLS: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {code: 0xFFFD for code in range(0x80, 0xA0)} | {0x7F: 0x2421, ord("\r"): None}


def harmless(text: str) -> str:
    """Control characters drawn as pictures: a model must not move the cursor, nor retitle the window."""
    return text.translate(_CONTROLS)


class View(Protocol):
    """Shows one answer."""

    def feed(self, pieces: Sequence[Piece]) -> None: ...
    def close(self) -> None: ...


class PlainView:
    """The text and nothing else."""

    def feed(self, pieces: Sequence[Piece]) -> None:
        """Write a round's text at once."""
        sys.stdout.write("".join(piece.text for piece in pieces))
        sys.stdout.flush()

    def close(self) -> None:
        """End the line."""
        sys.stdout.write("\n")
        sys.stdout.flush()


class DraftView:
    """The text as it is, each token coloured by the depth at which it was drafted."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def feed(self, pieces: Sequence[Piece]) -> None:
        """Write a round's text."""
        styled = [(harmless(piece.text), draft_style(self.console, piece.depth)) for piece in pieces]
        self.console.print(Text.assemble(*styled), end="", soft_wrap=True)
        self.console.file.flush()

    def close(self) -> None:
        """End the line."""
        self.console.print()


def draft_style(console: Console, depth: int) -> str:
    """The target's own tokens have none; without colours, drafted ones are underlined."""
    if not depth:
        return ""
    colours = console.color_system is not None and not console.no_color
    return DEPTHS[min(depth, len(DEPTHS)) - 1] if colours else "underline"


def legend(console: Console) -> Text:
    """What the colours mean, in themselves."""
    last = len(DEPTHS)
    names = [f" {depth} " if depth < last else f" {depth}+ " for depth in range(1, last + 1)]
    drawn = [(name, draft_style(console, depth)) for depth, name in enumerate(names, start=1)]
    return Text.assemble("drafted and accepted at depth ", *drawn, ", the target's own unmarked")


class MarkdownView:
    """Markdown, drawn anew as it grows.

    Only the last block can still change: blocks before it are printed once and scroll away like any text, and the last
    is erased and drawn again. What is erased never exceeds the screen, so that an answer of any length is there once:
    of a block that is taller, the end is shown until it is whole. After a resize the rows to erase are counted anew at
    the new width, as terminals re-wrap what they hold.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._text = ""
        """What is not yet printed for good."""
        self._printed = False
        self._widths: list[int] = []
        """Cells of each row that will be erased."""
        self._next_s = 0.0

    def feed(self, pieces: Sequence[Piece]) -> None:
        """Take a round's text; draw when the last drawing is old enough."""
        self._text += harmless("".join(piece.text for piece in pieces))
        if time.monotonic() >= self._next_s:
            cut = whole_blocks(self._text)
            done, self._text = self._text[:cut], self._text[cut:]
            self._draw(done, self._text)

    def close(self) -> None:
        """Print the rest for good."""
        self._draw(self._text, "")
        self._text = ""

    def _draw(self, done: str, growing: str) -> None:
        """Write over the last drawing: `done` for good, then `growing`, the end of it that fits the screen.

        Row by row: a terminal that is told to clear all of its screen may keep what was there in its history.
        """
        begun_s = time.monotonic()
        back = self._back()
        printed = self._rows(done)
        self._printed = self._printed or bool(printed)
        rows = self._rows(growing)[-max(1, self.console.height - 1) :]
        self._widths = [cell_len(_ESCAPE.sub("", row)) for row in rows]
        if written := [f"\x1b[K{row}" for row in (*printed, *rows)]:
            written[-1] = f"\x1b[J{written[-1]}"
        self.console.file.write(back + "\n".join(written) + ("" if rows or not printed else "\n"))
        self.console.file.flush()
        ended_s = time.monotonic()
        self._next_s = ended_s + max(REDRAW_S, (ended_s - begun_s) / DRAWING_SHARE)

    def _back(self) -> str:
        """The escapes that take the cursor to where the growing block began."""
        width, height = self.console.size
        rows = sum(max(1, -(-cells // width)) for cells in self._widths)
        up = min(rows, height) - 1
        return "\r" + (f"\x1b[{up}A" if up > 0 else "")

    def _rows(self, text: str) -> list[str]:
        """Rows as they are written, with a blank one between what was printed before and now."""
        if not text.strip():
            return []
        with self.console.capture() as captured:
            self.console.print(markdown(text))
        rows = [row.rstrip(" ") for row in captured.get().split("\n")]
        seen = [number for number, row in enumerate(rows) if _ESCAPE.sub("", row).strip()]
        rows = rows[seen[0] : seen[-1] + 1] if seen else []
        return ["", *rows] if self._printed else rows


def _parser():  # type: ignore[no-untyped-def]  # markdown-it comes with rich and is not ours to type
    """HTML and pictures are left as text: rich shows nothing of the one and no address of the other."""
    from markdown_it import MarkdownIt

    return MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline", "image"])


def markdown(text: str) -> Markdown:
    """For rich to draw; a line end within a paragraph stays one, since a model means it."""
    drawn = Markdown("", hyperlinks=False, code_theme="ansi_dark")
    drawn.markup, drawn.parsed = text, _parser().parse(text)
    for token in drawn.parsed:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
    return drawn


def whole_blocks(text: str) -> int:
    """The length of the blocks that no further text can change: all but the last one, of complete lines."""
    complete = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in _parser().parse(complete) if token.level == 0 and token.map]
    if not starts:
        return 0
    return sum(len(line) + 1 for line in complete.split("\n")[: starts[-1]])


def view(console: Console, *, drafts: bool) -> View:
    """The view for where the answer goes."""
    terminal = console.is_terminal and console.file.isatty()
    if not terminal or console.is_dumb_terminal or console.legacy_windows:
        return PlainView()
    return DraftView(console) if drafts else MarkdownView(console)
