"""Copy a finished run of the default recipe into the package, as the drafter and head that coral ships for pico.

python -m benchmarks.embed runs/pico
"""

import shutil
import sys
from pathlib import Path

import torch

from coral_core.artifacts import Manifest
from coral_core.drafter.load import FILES, load_drafter, save_drafter
from coral_core.embedded import FOLDER as PICO


def main() -> None:
    run = Path(sys.argv[1])
    for stage in ("drafter", "head"):
        shutil.rmtree(PICO / stage, ignore_errors=True)
        shutil.copytree(run / stage, PICO / stage)
    save_drafter(load_drafter(run / "drafter").to(torch.bfloat16), PICO / "drafter")
    Manifest.read(PICO / "drafter", "drafter", "").sealed(PICO / "drafter", *FILES).write(PICO / "drafter")
    shutil.copy(run / "data" / "holdout.json", PICO / "holdout.json")


if __name__ == "__main__":
    main()
