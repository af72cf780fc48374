"""Put a run's drafter and head into the package, in bfloat16, where its recipe finds them in a new installation.

python -m recipes.real.ship runs/smollm2-135m        # writes coral_core/shipped/smollm2-135m
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from coral_core import embedded
from coral_core.artifacts import Manifest, check_files, partial, replace_folder
from coral_core.drafter.load import load_drafter, save_drafter

PROMPTS = 40
"""Held-out prompts that go along: what `coral eval` measures on."""


def ship(run: Path, to: Path) -> None:
    """Copy drafter, head, recipe and some held-out prompts; the drafter is rounded to bfloat16.

    All is read and written beside `to` first: what lies there stays as it is until the new one is whole.
    """
    manifest, drafter = Manifest.read(run / "drafter", "drafter", "coral train"), load_drafter(run / "drafter")
    if (run / "head").exists():
        Manifest.read(run / "head", "head", "coral group-head")
        check_files(run / "head", (), "coral group-head")
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    prompts = json.loads((run / "data" / "holdout.json").read_text(encoding="utf-8"))[:PROMPTS]
    work = partial(to)
    shutil.rmtree(work, ignore_errors=True)
    (work / "drafter").mkdir(parents=True)
    save_drafter(drafter.to(torch.bfloat16), work / "drafter")
    manifest.sealed(work / "drafter").write(work / "drafter")
    if (run / "head").exists():
        shutil.copytree(run / "head", work / "head")
    (work / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (work / "holdout.json").write_text(json.dumps(prompts) + "\n", encoding="utf-8")
    replace_folder(work, to)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    folder = embedded.SHIPPED / run.resolve().name
    ship(run, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
