"""`coral train` as `accelerate launch` runs it, on two processes, to its very end."""

import json
import subprocess
import sys
from pathlib import Path

from coral_core.lock import locked
from tests.together import exit_codes, start_together
from tests.training.helpers import tiny_store

WORDS = "name=tiny train.steps=2 train.batch_size=4 train.checkpoint_every=1"


def train(folder: Path) -> tuple[list[int], str]:
    """(exit codes, what both said)."""
    log = folder / "said.txt"
    with log.open("w") as file:
        command = [sys.executable, "-m", "coral_cli.main", "train", *WORDS.split(), "--runs", str(folder)]
        codes = exit_codes(start_together(command, stdout=file, stderr=subprocess.STDOUT))
    return codes, log.read_text()


def test_two_processes_publish_one_drafter_and_part(tmp_path: Path) -> None:
    """The group of processes was ended in the middle of the command, and freed when that could wait forever."""
    tiny_store(tmp_path / "tiny" / "data")
    codes, said = train(tmp_path)
    assert codes == [0, 0], said
    assert said.count("written to") == 1, said
    run = tmp_path / "tiny"
    assert {path.name for path in run.iterdir()} == {"data", "drafter", "log.jsonl", "recipe.yaml"}
    assert json.loads((run / "drafter" / "manifest.json").read_text())["facts"]["last"]["step"] == 2


def test_where_one_process_fails_both_end(tmp_path: Path) -> None:
    tiny_store(tmp_path / "tiny" / "data")
    with locked(tmp_path / "tiny", "train"):
        codes, said = train(tmp_path)
    assert codes[0] == 1
    assert 0 not in codes
    assert said.count("is in use: 'train', process") == 1, said
