"""Trains the tiny drafter in a process of its own: `python -m tests.training.runner WORK KILL_AFTER [key=number ...]`.

Writes the weights to WORK/weights-RANK.safetensors and the log to WORK/log.jsonl. With KILL_AFTER above 0 the process
kills itself, as `kill -9` does, once that many steps are done.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from coral_core.processes import part
from coral_core.store.store import Store
from coral_core.training.loop import Reports, train
from tests.training.helpers import tiny_spec


def main(work: Path, kill_after: int, **changes: float) -> None:
    torch.set_num_threads(1)
    lines = []

    def progress(_stage: str, done: int, _total: int, _numbers: dict[str, float]) -> None:
        if kill_after and done == kill_after + 1:  # the checkpoint of step `kill_after` is on disk
            os.kill(os.getpid(), signal.SIGKILL)

    store = Store.open(work / "data")
    drafter = train(tiny_spec(**changes), store, seed=5, work=work, reports=Reports(lines.append, progress))
    save_file(drafter.state_dict(), work / f"weights-{os.environ.get('RANK', '0')}.safetensors")
    if lines:
        (work / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    part()


if __name__ == "__main__":
    pairs = (argument.split("=") for argument in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), **{key: json.loads(value) for key, value in pairs})
