"""How every benchmark keeps what it measured: benchmarks/results/NAME.json."""

import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from coral_core.artifacts import git_commit, versions, write_text
from coral_core.bench.evaluate import device_name

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def record(name: str, figures: dict[str, Any], rows: list[dict[str, Any]], part: str = "") -> Path:
    """Write {figures, rows, machine, versions, command, date}; `figures` are what the README quotes.

    Where only a part of the rows is new, and others stay as they were, `parts` says the last four of each part.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    made = {
        "machine": machine(),
        "versions": versions() | {"git_commit": git_commit()},
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    value = {"figures": figures, "rows": rows, **made}
    if part:
        before = json.loads(path.read_text(encoding="utf-8")).get("parts", {}) if path.exists() else {}
        value["parts"] = before | {part: made}
    write_text(path, json.dumps(value, indent=1) + "\n")
    return path


def _program() -> list[str]:
    """What Python was told to run: a module by its name, so that the command can be pasted."""
    spec = sys.modules["__main__"].__spec__
    return [Path(sys.argv[0]).name] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
