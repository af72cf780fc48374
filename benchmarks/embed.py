"""Copy a finished run of the default recipe into the package, as the drafter and head that coral ships for pico.

python -m benchmarks.embed runs/pico
"""

import shutil
import sys
from pathlib import Path

import torch

from coral_core.artifacts import Manifest, check_files, partial, replace_folder, write_text
from coral_core.drafter.load import FILES, load_drafter, save_drafter
from coral_core.embedded import FOLDER as PICO

COMMANDS = {"drafter": "coral train", "head": "coral group-head"}


def embed(run: Path, to: Path) -> None:
    """Copy drafter, head and held-out prompts; the drafter is rounded to bfloat16.

    All is read and written beside its place first: what lies there stays as it is until the new one is whole.
    """
    manifests = {stage: Manifest.read(run / stage, stage, command) for stage, command in COMMANDS.items()}
    for stage, command in COMMANDS.items():
        check_files(run / stage, (), command)
    prompts = (run / "data" / "holdout.json").read_text(encoding="utf-8")
    for stage in COMMANDS:
        shutil.rmtree(partial(to / stage), ignore_errors=True)
        shutil.copytree(run / stage, partial(to / stage))
    work = partial(to / "drafter")
    save_drafter(load_drafter(run / "drafter").to(torch.bfloat16), work)
    manifests["drafter"].sealed(work, *FILES).write(work)
    for stage in COMMANDS:
        replace_folder(partial(to / stage), to / stage)
    write_text(to / "holdout.json", prompts)


if __name__ == "__main__":
    embed(Path(sys.argv[1]), PICO)
