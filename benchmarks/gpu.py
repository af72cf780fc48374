"""What has to run on a GPU, in one command of ten minutes; a part that fails is written down, and the next one runs.

    python -m benchmarks.gpu OUT                      # OUT/gpu.json and OUT/gpu.log
    python -m benchmarks.gpu OUT --shape tiny         # the same code with tiny shapes, on any machine
    python -m benchmarks.gpu OUT --model FOLDER       # where the machine has no network: a folder that holds SmolLM2

tests: those marked `gpu`. eager, recorded, compiled: an 8B-shaped target with random weights, a plain step,
verification of up to 60 nodes, draft levels with the full and the grouped head, whole rounds, with forwards that run
as they come, that are recorded as CUDA graphs, and that torch.compile(mode="reduce-overhead") records in their place.
training: a drafter of that shape. model: SmolLM2 from its data to an evaluation.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode_gpu
from benchmarks.record import machine
from benchmarks.train import LLAMA_3_8B, Job
from coral_core.artifacts import git_commit, versions, write_text

ROOT = Path(__file__).parent.parent
FORMS = ("eager", "recorded", "compiled")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = "data.max_samples=48 data.holdout=8 data.max_new_tokens=48 train.steps=60 train.checkpoint_every=60"
SMALL += " head.router_steps=60 head.groups=64 head.active=8 decode.max_new_tokens=64"
LIMIT_S = {"tests": 120, "eager": 90, "recorded": 90, "compiled": 180, "training": 90, "model": 300}
"""Seconds after which a part is stopped and counted as failed."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Commands that are run one after the other, each in a process of its own."""

    name: str
    commands: list[list[str]]


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """What is run, in this order; the shortest first."""
    python = [sys.executable, "-m"]
    yield Part("tests", [[*python, "pytest", "-q", "-m", "gpu", "tests"]])
    for form in FORMS:
        shape = ["--shape", options.shape, "--repeats", str(options.repeats)]
        yield Part(form, [[*python, "benchmarks.decode_gpu", "--form", form, *shape]])
    yield Part(
        "training", [[*python, "benchmarks.train", "--job", json.dumps(dataclasses.asdict(training_job(options)))]]
    )
    run = [f"target.model={options.model}", "name=gpu", *SMALL.split(), "--runs", str(options.out / "runs")]
    stages = [["prepare-data"], ["train"], ["group-head"], ["eval", "--limit", "4", "--json"]]
    yield Part("model", [[*python, "coral_cli.main", *stage, *run] for stage in stages])


def training_job(options: argparse.Namespace) -> Job:
    """A step on one dialogue, the shape's own."""
    if options.shape == "tiny":
        tiny = {key: value for key, value in decode_gpu.SHAPES["tiny"].items() if key in LLAMA_3_8B}
        return Job("fast", 64, tiny, budget_s=1.0)
    return Job("fast", 2048, LLAMA_3_8B, "bfloat16", 4, 20.0)


def run(part: Part, limit_s: float, log: Path) -> dict[str, Any]:
    """Run a part, whatever comes of it: what it printed as JSON, how long it took, and why it failed if it did."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun_s, rows, error = time.monotonic(), [], ""
    for command in part.commands:
        left_s = limit_s - (time.monotonic() - begun_s)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=max(1.0, left_s),
            )
            said, code = (done.stdout, done.stderr), done.returncode
        except subprocess.TimeoutExpired as late:
            said, code = (_text(late.stdout), _text(late.stderr) + f"\nstopped after {limit_s:g} s"), -1
        except OSError as failed:
            said, code = ("", str(failed)), -1
        with log.open("a", encoding="utf-8") as file:
            file.write(f"==== {part.name}: {' '.join(command)}\n{said[0]}\n{said[1]}\n==== exit code {code}\n")
        rows += json_lines(said[0])
        if code != 0:
            error = next((line for line in reversed("\n".join(said).splitlines()) if line.strip()), f"exit code {code}")
            break
    return {"part": part.name, "ok": not error, "error": error, "elapsed_s": time.monotonic() - begun_s, "rows": rows}


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def json_lines(text: str) -> list[Any]:
    """The objects that stand in a line each, or the whole text when it is one."""
    found = []
    for candidate in [text] if text.lstrip().startswith("{\n") else text.splitlines():
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=list(decode_gpu.SHAPES), default="llama-3-8b")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--only", nargs="+", choices=list(LIMIT_S), help="these parts alone")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu.log"
    log.write_text("", encoding="utf-8")
    value: dict[str, Any] = {"machine": machine(), "versions": versions() | {"git_commit": git_commit()}, "parts": []}
    value["cuda"] = torch.cuda.is_available()
    for part in parts(options):
        if options.only and part.name not in options.only:
            continue
        value["parts"].append(run(part, LIMIT_S[part.name], log))
        last = value["parts"][-1]
        print(f"{part.name}: {last['error'] or 'ok'} ({last['elapsed_s']:.0f} s)", file=sys.stderr, flush=True)
        write_text(options.out / "gpu.json", json.dumps(value, indent=1) + "\n")
    print(options.out / "gpu.json")


if __name__ == "__main__":
    main()
