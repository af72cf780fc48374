"""What is damaged is named by every command that reads it, and the command that the message names mends it."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from coral_cli.main import app
from tests.training.helpers import tiny_store

WORDS = "name=tiny train.steps=2 train.batch_size=4 head.groups=4 head.active=2 head.router_steps=1"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "another JSON": lambda path: path.write_text('["what", "is", "this"]'),
}
MARKS = {"truncated": pytest.mark.slow, "empty": pytest.mark.slow, "another JSON": pytest.mark.slow}
READERS = {"drafter": ("train", "group-head", "inspect"), "head": ("group-head", "inspect")}
ANOTHER_HEAD = "head.router_steps=2"
"""For group-head to read a drafter: where its head is finished, it reads the drafter's manifest alone."""
FILES = {
    "drafter": ("manifest.json", "config.json", "model.safetensors"),
    "head": ("manifest.json", "head.safetensors"),
}
CASES = [(stage, file, reader) for stage, readers in READERS.items() for file in FILES[stage] for reader in readers]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("läufe und mehr") / "tiny"  # a path with spaces and letters beyond ASCII
    tiny_store(folder / "data")
    for command in ("train", "group-head"):
        assert coral(folder, command).exit_code == 0
    return folder


def coral(run: Path, command: str, *more: str) -> Result:
    words = [str(run)] if command == "inspect" else [*WORDS.split(), *more, "--runs", str(run.parent)]
    result = CliRunner().invoke(app, [command, *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    "damage", [pytest.param(act, marks=MARKS.get(name, ()), id=name) for name, act in DAMAGES.items()]
)
@pytest.mark.parametrize(("stage", "file", "reader"), CASES)
def test_the_command_that_is_named_mends_it(
    run: Path, stage: str, file: str, reader: str, damage: Callable[[Path], object]
) -> None:
    before = json.loads((run / stage / "manifest.json").read_text())
    damage(run / stage / file)
    done = coral(run, reader, *([ANOTHER_HEAD] if (stage, reader) == ("drafter", "group-head") else []))
    if done.exit_code:
        assert re.search(rf"error: .*{stage}", done.stderr), done.stderr
        (named,) = re.findall(r"Run: coral ([\w-]+)", done.stderr)
        assert coral(run, named).exit_code == 0
    else:  # the command is the one that makes it, and says that it does
        assert "is made anew, and replaced at the end, since" in done.stderr
        assert file in done.stderr
    again = coral(run, "inspect")
    assert again.exit_code == 0, again.stderr
    after = json.loads((run / stage / "manifest.json").read_text())
    assert (after["fingerprint"], set(after["files"])) == (before["fingerprint"], set(before["files"]))


def test_a_drafter_of_another_recipe_is_replaced_with_a_word(run: Path) -> None:
    words = shlex.split(f"{WORDS} train.learning_rate=0.002 --runs '{run.parent}'")
    done = CliRunner().invoke(app, ["train", *words])
    assert f"{run / 'drafter'} is made anew, and replaced at the end, since train.learning_rate was " in done.stderr
    assert coral(run, "train").exit_code == 0
    assert coral(run, "group-head").exit_code == 0


def test_nothing_but_the_stages_lies_in_a_run(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {"data", "drafter", "head", "log.jsonl", "recipe.yaml"}
