"""`coral chat` as its user has it: in a pipe, and on a terminal of its own."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coral_cli.commands import chat
from coral_cli.talk.session import Session
from coral_core.run import Run
from tests.cli.test_chat_session import counting, session
from tests.cli.test_whole_job import coral

ESCAPE = "\x1b"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The chat talks with a random model; the sessions that it opened."""
    opened: list[Session] = []

    def tiny(run: Run, speculative: bool) -> Session:
        opened.append(session(counting(max_positions=200), drafted=speculative))
        return opened[-1]

    monkeypatch.setattr(chat, "_session", tiny)
    return opened


def test_a_pipe_has_the_answers_on_stdout_and_the_rest_on_stderr(tiny: list[Session], tmp_path: Path) -> None:
    done = coral(tmp_path, "chat", stdin="Hello!\n\n/temperature 0\nAnd?\n/exit\nnot asked\n")
    assert done.returncode == 0
    assert done.stdout == "".join(f"{message['content']}\n" for message in tiny[0].messages[1::2])
    assert [message["content"] for message in tiny[0].messages[::2]] == ["Hello!", "And?"]
    assert ESCAPE not in done.stderr
    assert re.findall(
        r"^\[14 tokens, [\d.]+ tokens/s, tau [\d.]+, drafting is [\d.]+x plain decoding "
        r"\(a sample of 16 plain tokens\)\] cut at decode.max_new_tokens=14$",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
    assert "temperature 0 from now on" in done.stderr


def test_the_end_of_the_input_leaves(tiny: list[Session], tmp_path: Path) -> None:
    done = coral(tmp_path, "chat", "--no-speculative", stdin="Hello!")
    assert done.returncode == 0 and len(tiny[0].messages) == 2
    assert "tau" not in done.stderr and "without drafts" in done.stderr


def test_show_drafts_in_a_pipe_says_that_it_needs_a_terminal(tiny: list[Session], tmp_path: Path) -> None:
    plain = coral(tmp_path, "chat", stdin="Hello!\n")
    drafts = coral(tmp_path, "chat", "--show-drafts", stdin="Hello!\n")
    assert drafts.stdout == plain.stdout and ESCAPE not in drafts.stderr
    assert "--show-drafts needs a terminal" in drafts.stderr


def test_each_slip_is_one_line_and_the_chat_goes_on(tiny: list[Session], tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("mine")
    slips = {
        "/clera": "did you mean /clear?",
        "/temperature warm": "must be a number from 0",
        "/save there.json": "there.json is there already",
        "/save absent/x.json": "cannot write absent/x.json: No such file or directory",
        "word " * 60: "tokens and the target's context holds 200; shorten the prompt, or start anew with /clear",
    }
    done = coral(tmp_path, "chat", stdin="Hello!\n" + "".join(f"{slip}\n" for slip in slips) + "/clear\nAnd?\n")
    assert done.returncode == 0
    for message in slips.values():
        assert [message in line for line in done.stderr.splitlines()].count(True) == 1, message
    assert (tmp_path / "there.json").read_text() == "mine"
    assert len(tiny[0].messages) == 2, "after them the dialogue was cleared, and went on"


def test_bytes_that_are_no_text_are_no_traceback(tmp_path: Path) -> None:
    """A file of another encoding, piped in."""
    command, said = light(words=2), b"caf\xe9\n/exit\n"
    done = subprocess.run(command, input=said, capture_output=True, cwd=tmp_path, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, b"**word** **word** *\n"), done.stderr
    assert b"tokens/s" in done.stderr and b"\x1b" not in done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path.cwd()), "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}


LIGHT = """
import sys, time, types
sys.path.insert(0, {root!r})
import coral_cli.commands.chat as chat
from coral_cli.main import app
from coral_cli.talk.session import Session

class Bytes:  # a tokenizer of one token per letter
    def decode(self, ids, **_):
        return "".join(map(chr, ids))
    def convert_ids_to_tokens(self, token):
        return chr(token)

class Talker(Session):  # says so many words, in rounds of one word each; with no model, it is there in a second
    def clear(self):
        self.messages, self._said = [], []
    def compare(self):
        pass
    def _prompt(self, messages):
        return [0]
    def _decode(self, prompt):
        word = [*map(ord, "**word** ")]
        yield types.SimpleNamespace(new_ids=word[:1], kind="prefill", accepted_drafts=0)
        for _ in range({words}):
            time.sleep(0.01)
            yield types.SimpleNamespace(new_ids=[*word[1:], word[0]], kind="draft", accepted_drafts=8)

target = types.SimpleNamespace(tokenizer=Bytes(), stop_ids=(), max_positions=10**6)
chat._session = lambda run, on: Talker(target, None, 10**6, object, drafted=True)
sys.argv = ["coral", "chat", *{arguments!r}]
app()
assert not {{"torch", "transformers"}} & set(sys.modules)
"""


def light(*arguments: str, words: int) -> list[str]:
    """A command that chats, in an interpreter of its own."""
    return [sys.executable, "-c", LIGHT.format(root=str(Path.cwd()), arguments=arguments, words=words)]


class Terminal:
    """A chat on a terminal of its own, with a target that hardly ever stops talking."""

    def __init__(self, folder: Path, *arguments: str, words: int = 10**6) -> None:
        import pty

        command = light(*arguments, words=words)
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would this
            os.execve(command[0], command, environment())
        self.seen = ""

    def wait_for(self, text: str, timeout_s: float = 120.0) -> str:
        """What came up to where `text` is seen, escapes left out; it is taken."""
        deadline = time.monotonic() + timeout_s
        while text not in self.plain:
            assert time.monotonic() < deadline, self.plain[-2000:]
            if select.select([self.file], [], [], 0.2)[0]:
                self.seen += os.read(self.file, 65536).decode(errors="replace")
        found, self.seen = self.seen, ""
        return found

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.seen)

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def press_until(self, key: str, text: str) -> None:
        """Press again when nothing comes: the terminal itself may have shown what was typed, before the line editor
        listened, and then a Ctrl-C still belongs to the answer before. On a busy machine that was so."""
        for _ in range(9):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.wait_for(text, timeout_s=5.0)
                return
        raise AssertionError(self.plain[-2000:])

    def ended(self) -> int:
        with contextlib.suppress(OSError):  # Linux tells the end so
            while select.select([self.file], [], [], 60)[0]:
                if not os.read(self.file, 65536):
                    break
            else:
                os.kill(self.process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[type[Terminal]]:
    """Makes one, which is ended whatever happens."""
    made: list[Terminal] = []

    def make(*arguments: str, **others: int) -> Terminal:
        made.append(Terminal(tmp_path, *arguments, **others))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        with contextlib.suppress(OSError):
            os.close(one.file)  # hangs up


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal: type[Terminal]) -> None:
    """With history (the key Up), Markdown, and a hint where Ctrl-C finds no answer."""
    chat = terminal()
    chat.wait_for("> ")
    chat.type("Talk!\r")
    drawn = chat.wait_for("word word word word")
    assert "\x1b[1mword" in drawn, "bold, as Markdown says"
    chat.type("\x03")
    assert "] stopped" in chat.wait_for("> ")
    chat.type("\x1b[A")  # Up
    chat.wait_for("Talk!")
    chat.type("\x01No \x05 Ctrl-A and -E.\r")  # to the line's ends
    chat.wait_for("word word")
    chat.type("\x03")
    assert "] stopped" in chat.wait_for("> ")
    chat.type("half a li")
    chat.wait_for("half a li")
    chat.press_until("\x03", "(/exit or Ctrl-D leaves)")
    chat.type("/save said.json\r")
    chat.wait_for("4 messages saved")
    chat.type("\x04")
    assert chat.ended() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_d_pressed_during_an_answer_leaves_after_it(terminal: type[Terminal]) -> None:
    """A terminal that gathers lines would take it for the end of one."""
    chat = terminal(words=100)
    chat.wait_for("> ")
    chat.type("Talk!\r")
    chat.wait_for("word word")
    chat.type("\x04")
    chat.wait_for("tokens/s")
    assert chat.ended() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_show_drafts_colours_what_was_drafted(terminal: type[Terminal]) -> None:
    chat = terminal("--show-drafts")
    assert "drafted and accepted at depth" in chat.wait_for("> ")
    chat.type("Talk!\r")
    drawn = chat.wait_for("**word** **word**")
    assert re.search(r"\x1b\[[\d;]*48;5;\d+m\*", drawn), "with its ground, and no Markdown"
    chat.type("\x03")
    chat.wait_for("> ")
    chat.type("/exit\r")
    assert chat.ended() == 0
