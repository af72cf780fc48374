"""What is on the terminal: Markdown that grows, long answers, a resize; colours of drafts; nothing of it in a pipe."""

import io
import random
import re

import pytest
from rich.console import Console

from coral_cli.talk.session import Piece
from coral_cli.talk.views import DEPTHS, DraftView, MarkdownView, PlainView, legend, view, whole_blocks

LONG = """# A plan

A **bold** paragraph that is so long that it wraps over several rows of a narrow terminal, which is what models write.
A second line.

- one
- two

| name | value |
|---|---|
| a | 1 |

```python
def f(x):

    return x
```

""" + "\n".join(f"{number}. item number {number} of a list that is taller than the screen" for number in range(1, 41))


class Screen(io.StringIO):
    """The rows that a terminal would hold, scrolled-away ones too: it knows SGR, \\r, \\n, up, and two erasures."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows: list[str] = [""]
        self.row = self.column = 0
        self.cleared_whole = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for escape, count, kind, character in re.findall(r"(\x1b\[([\d;]*)([A-Za-z]))|(.|\n)", text, re.DOTALL):
            if escape:
                self.obey(kind, int(count or 1) if kind == "A" else 0)
            else:
                self.put(character)
        return len(text)

    def obey(self, kind: str, count: int) -> None:
        top = max(0, len(self.rows) - self.height)
        if kind == "A":
            self.row = max(top, self.row - count)  # a cursor does not go up into the history
        elif kind in "KJ":
            self.rows[self.row] = self.rows[self.row][: self.column]
            if kind == "J":
                self.cleared_whole += len(self.rows) >= self.height and self.row == top and self.column == 0
                del self.rows[self.row + 1 :]
        else:
            assert kind == "m", kind

    def put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n" or self.column == self.width:  # the next one after a full row wraps
            self.row, self.column = self.row + 1, 0
            self.rows += [""] * (self.row + 1 - len(self.rows))
        if character not in "\r\n":
            before = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = before[: self.column] + character + before[self.column + 1 :]
            self.column += 1

    def resize(self, width: int) -> None:
        """As terminals that re-wrap: each row anew at the new width, the cursor after the last letter of its own."""
        rows = []
        for text in self.rows:
            rows += [text[start : start + width] for start in range(0, max(1, len(text)), width)]
        self.rows, self.width = rows, width
        self.row, self.column = len(rows) - 1, len(rows[-1])

    def console(self) -> Console:
        return Sized(self)

    @property
    def text(self) -> str:
        return "\n".join(self.rows)


class Sized(Console):
    """A console that asks its screen for its size every time, as rich asks the terminal."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(file=screen, force_terminal=True, color_system="truecolor", highlight=False, _environ={})
        self.screen = screen

    @property
    def size(self):  # type: ignore[no-untyped-def, override]
        from rich.console import ConsoleDimensions

        return ConsoleDimensions(self.screen.width, self.screen.height)


@pytest.fixture(autouse=True)
def every_round_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coral_cli.talk.views.REDRAW_S", 0.0)
    monkeypatch.setattr("coral_cli.talk.views.DRAWING_SHARE", float("inf"))


def pieces(text: str, seed: int = 0, longest: int = 9) -> list[list[Piece]]:
    """The text in rounds of random length."""
    rng, found = random.Random(seed), []
    while text:
        size = rng.randint(1, longest)
        found.append([Piece(text[:size], 0)])
        text = text[size:]
    return found


def drawn(text: str, width: int = 60, height: int = 12, before: str = "") -> Screen:
    screen = Screen(width, height)
    screen.write(before)
    shown = MarkdownView(screen.console())
    for piece in pieces(text, longest=60):
        shown.feed(piece)
    shown.close()
    assert not screen.cleared_whole, "tmux puts a screen that is cleared whole into its history"
    return screen


@pytest.mark.parametrize(("width", "height"), [(60, 12), (60, 200), (33, 7), (19, 4), (100, 2)])
def test_a_long_answer_is_on_the_terminal_once(width: int, height: int) -> None:
    """However it came, and however often it was drawn: what stays is what a single drawing of all of it says."""
    screen = drawn(LONG, width, height, "> question\n")
    assert screen.rows[0] == "> question"
    screen_at_once = Screen(width, 10_000)
    screen_at_once.write("> question\n")
    shown = MarkdownView(screen_at_once.console())
    shown.feed([Piece(LONG, 0)])
    shown.close()
    # rich sets a second blank row before a table, where it draws the block before it too
    assert [row for row in screen.rows if row.strip()] == [row for row in screen_at_once.rows if row.strip()]
    words = " ".join(screen.text.split())
    assert [words.count(f"{number} item number {number} ") for number in range(1, 41)] == [1] * 40
    assert "**" not in screen.text and "```" not in screen.text and "|---" not in screen.text


@pytest.mark.parametrize("widths", [(60, 31), (40, 90), (60, 20, 75)])
def test_a_resize_in_the_middle_leaves_no_remains(widths: tuple[int, ...]) -> None:
    """On terminals that re-wrap; the growing block is the same text at another width."""
    text = "First.\n\n" + "words that wrap, " * 14 + "\nEND.\n\nLast."
    screen = Screen(widths[0], 60)
    shown = MarkdownView(screen.console())
    for number, piece in enumerate(pieces(text)):
        if number and number % 15 == 0 and number // 15 < len(widths):
            screen.resize(widths[number // 15])
        shown.feed(piece)
    shown.close()
    words = " ".join(screen.text.split())
    assert words == " ".join(text.split())


def test_words_are_never_left_out() -> None:
    """rich shows nothing of HTML, no address of a picture, and joins lines."""
    text = "<b>bold</b> ![a cat](https://x.org/cat.png) [here](https://x.org/y)\n\n<div>\nblock\n</div>\n\none\ntwo\n"
    screen = drawn(text, 100)
    for words in ("<b>bold</b>", "a cat (https://x.org/cat.png)", "here (https://x.org/y)", "<div>", "</div>"):
        assert words in screen.text
    assert "one" in screen.rows and "two" in screen.rows


def test_a_model_cannot_move_the_cursor_or_retitle_the_window() -> None:
    evil = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9b5A\x08e"
    assert "a␛[2Jb␛]0;title␇cd\ufffd5A␈e" in drawn(evil).text
    screen = Screen(60, 12)
    shown = DraftView(screen.console())
    shown.feed([Piece(evil, 1)])
    assert "a␛[2Jb␛]0;title␇cd\ufffd5A␈e" in screen.text


def test_any_text_can_be_drawn() -> None:
    rng = random.Random(1)
    parts = [*"*_`~[]()<>#|-+!&\\> \n\n\t1.x", "```", "---", "| a |\n", "  - ", "](", "http://a.b"]
    for _ in range(60):
        drawn("".join(rng.choices(parts, k=60)), 30, 6)


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one", ""),
        ("one\n", ""),
        ("one\n\ntwo", ""),  # "two" may become "    two", or a table's head: wait for the line
        ("one\n\ntwo\n", "one\n\n"),
        ("one\n#", ""),
        ("one\n# two\n", "one\n"),
        ("# one\n\n```\na\n\nb\n", "# one\n\n"),
        ("- a\n- b\n\n  c\n", ""),
        ("one\r\n\r\ntwo\r\n", "one\r\n\r\n"),
        ("\n\n", ""),
    ],
)
def test_only_what_cannot_change_is_printed_for_good(text: str, done: str) -> None:
    assert text[: whole_blocks(text)] == done


def coloured(console: Console) -> str:
    shown = DraftView(console)
    shown.feed([Piece("own ", 0), Piece("first ", 1), Piece("second", 2), Piece("\nninth", 9)])
    shown.close()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_drafted_tokens_are_coloured_by_depth_and_the_targets_own_are_not() -> None:
    terminal = {"force_terminal": True, "_environ": {}, "width": 80}
    ground = {depth: style.rpartition("#")[2] for depth, style in enumerate(DEPTHS, start=1)}
    code = {depth: ";".join(str(int(name[i : i + 2], 16)) for i in (0, 2, 4)) for depth, name in ground.items()}
    found = coloured(Console(file=io.StringIO(), color_system="truecolor", **terminal))  # type: ignore[arg-type]
    assert re.sub(r"\x1b\[[\d;]*m", "", found) == "own first second\nninth\n"
    assert found.startswith("own \x1b[")
    for depth, words in ((1, "first "), (2, "second"), (len(DEPTHS), "ninth")):
        assert re.search(rf"\x1b\[[\d;]*48;2;{code[depth]}m{words}\x1b\[0m", found), words
    assert len(set(code.values())) == len(DEPTHS)
    grey = coloured(Console(file=io.StringIO(), color_system="truecolor", no_color=True, **terminal))  # type: ignore[arg-type]
    assert "\x1b[4mfirst \x1b[0m" in grey and "48;2" not in grey, "NO_COLOR: underlined"
    assert legend(Console(file=io.StringIO())).plain == (
        "drafted and accepted at depth  1  2  3  4  5+ , the target's own unmarked"
    )


@pytest.mark.parametrize("drafts", [True, False])
def test_a_pipe_gets_plain_text(drafts: bool, capsys: pytest.CaptureFixture[str]) -> None:
    shown = view(Console(file=io.StringIO(), force_terminal=True, _environ={}), drafts=drafts)
    assert isinstance(shown, PlainView), "FORCE_COLOR makes no terminal of a pipe: nothing there can be erased"
    shown.feed([Piece("**a**", 2), Piece("\x1b", 0)])
    shown.close()
    assert capsys.readouterr().out == "**a**\x1b\n", "the text as it is"


def test_the_view_fits_the_terminal() -> None:
    console = Screen(60, 12).console()
    assert isinstance(view(console, drafts=False), MarkdownView)
    assert isinstance(view(console, drafts=True), DraftView)
    dumb = Console(file=Screen(60, 12), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(view(dumb, drafts=False), PlainView)
