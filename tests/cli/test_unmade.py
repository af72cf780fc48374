"""A drafter or a head that a run has not is told before the target is read, which may take a minute."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coral_cli.main import app
from coral_core import embedded, run

COMMANDS = {
    "chat": "chat name=mine",
    "serve": "serve name=mine --port 0",
    "eval": "eval name=mine --bench own --questions own.jsonl",
}
PLAIN = ", or chat without a drafter: --no-speculative"


class ReadError(Exception):
    pass


def read(*_: object, **__: object) -> None:
    raise ReadError


@pytest.fixture(autouse=True)
def unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that is not pico, for which coral ships a drafter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load_target", read)
    Path("own.jsonl").write_text('{"prompt": "Hello"}\n')


def told(command: str, *options: str) -> str:
    done = CliRunner().invoke(app, [*COMMANDS[command].split(), "target.model=some/model", *options])
    if isinstance(done.exception, ReadError):
        raise done.exception
    assert done.exit_code == 1, done.exception
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_without_a_drafter(command: str) -> None:
    again = "name=mine target.model=some/model"
    end = PLAIN if command == "chat" else ""
    assert told(command) == f"error: no drafter in runs/mine/drafter. Run: coral train {again}{end}"
    assert not Path("runs/mine").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_without_the_head_that_is_asked_for(command: str) -> None:
    shutil.copytree(embedded.FOLDER / "drafter", "runs/mine/drafter")
    end = PLAIN if command == "chat" else ""
    for kind in ("grouped", "static"):
        said = told(command, f"head.kind={kind}")
        assert said.startswith("error: no head in runs/mine/head. Run: coral group-head name=mine") and said.endswith(
            end
        )
    with pytest.raises(ReadError):
        told(command, "head.kind=full")


def test_a_chat_without_a_drafter_needs_none() -> None:
    with pytest.raises(ReadError):
        told("chat", "--no-speculative")
