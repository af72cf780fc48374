"""One evaluation: question sets raced, finished questions kept on disk as they come, numbers published at the end."""

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coral_core.artifacts import Manifest, fingerprint, stage, versions, write_text
from coral_core.bench.baseline import OWN_LOOP, Baseline, fastest_plain
from coral_core.bench.metrics import summarise
from coral_core.bench.questions import Question
from coral_core.bench.race import Lane, Racers, Turn, first_prompt, race
from coral_core.decoding.assemble import Assembled, sampler
from coral_core.errors import DataError
from coral_core.progress import Progress
from coral_core.recipe.loader import to_mapping
from coral_core.recipe.schema import Recipe

SCHEMA = 1
PROBES = 3
"""Questions on which the plain decoders are compared before the race."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A named list of questions."""

    name: str
    questions: list[Question]


def evaluate(
    recipe: Recipe, run: Path, assembled: Assembled, benches: Sequence[Bench], progress: Progress
) -> dict[str, Any]:
    """Race every bench and publish RUN/eval/results.json; the same object is returned.

    An interrupted evaluation of the same thing goes on behind its last finished question.
    """
    settings: dict[str, Any] = {
        "recipe": to_mapping(recipe),
        "target": assembled.engine.target.fingerprint,
        "drafter": assembled.drafter_fingerprint,
        "questions": {bench.name: [dataclasses.asdict(question) for question in bench.questions] for bench in benches},
    }
    with stage(run / "eval", fingerprint(settings)) as work:
        found = _baseline(recipe, assembled, benches[0].questions)
        results = _header(recipe, assembled)
        results["plain_decoders"] = {baseline.name: baseline.tokens_per_s for baseline in found}
        results["benches"] = {
            bench.name: _run_bench(recipe, assembled, bench, found[0], work, progress) for bench in benches
        }
        write_text(work / "results.json", json.dumps(results, indent=2) + "\n")
        Manifest(
            kind="eval",
            fingerprint=fingerprint(settings),
            inputs={"target": settings["target"], "drafter": settings["drafter"]},
            recipe=settings["recipe"],
            facts={"benches": [bench.name for bench in benches]},
        ).write(work)
    return results


def _baseline(recipe: Recipe, assembled: Assembled, questions: list[Question]) -> list[Baseline]:
    target = assembled.engine.target
    prompts = [first_prompt(target, question) for question in questions[:PROBES]]
    fitting = [prompt for prompt in prompts if len(prompt) < target.max_positions]
    if not fitting:
        raise DataError(f"no question fits the target's context of {target.max_positions} tokens; use shorter ones")
    return fastest_plain(target, fitting, sampler(recipe), recipe.decode.max_new_tokens)


def _run_bench(
    recipe: Recipe, assembled: Assembled, bench: Bench, fastest: Baseline, work: Path, progress: Progress
) -> dict[str, Any]:
    rows = work / f"{bench.name}.jsonl"
    done = [[_turn(turn) for turn in json.loads(line)] for line in _whole_lines(rows)]
    baseline = None if fastest.name.startswith(OWN_LOOP) and _same_dtype(assembled, fastest) else fastest.decode
    racers = Racers(assembled.engine, sampler(recipe), recipe.decode.max_new_tokens, baseline)
    total = len(bench.questions)
    progress(bench.name, len(done), total, {})
    with rows.open("a", encoding="utf-8") as file:
        for turns in race(racers, bench.questions[len(done) :]) if len(done) < total else ():
            file.write(json.dumps([dataclasses.asdict(turn) for turn in turns]) + "\n")
            file.flush()
            done.append(turns)
            so_far = summarise(done)
            numbers = {"tau": so_far["tokens_per_round_micro"], "speedup": so_far["speedup"]}
            progress(bench.name, len(done), total, {key: value for key, value in numbers.items() if value is not None})
    settings = {"temperature": recipe.decode.temperature, "seed": recipe.seed, "baseline": fastest.name}
    return {**settings, **summarise(done)}


def _same_dtype(assembled: Assembled, baseline: Baseline) -> bool:
    return baseline.name.endswith(str(assembled.engine.target.dtype).removeprefix("torch."))


def _whole_lines(path: Path) -> list[str]:
    """The lines that were written to their end; a last one cut by an interruption is removed from the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        write_text(path, "".join(whole))
    return whole


def _turn(row: dict[str, Any]) -> Turn:
    lanes = {name: Lane(**row[name]) if row[name] else None for name in ("plain", "speculative", "baseline")}
    return Turn(**{**row, **lanes})


def _header(recipe: Recipe, assembled: Assembled) -> dict[str, Any]:
    target = assembled.engine.target
    return {
        "schema": SCHEMA,
        "target": {"model": recipe.target.model, "fingerprint": target.fingerprint},
        "drafter": {"preset": recipe.train.preset, "fingerprint": assembled.drafter_fingerprint},
        "head": {"kind": recipe.head.kind, "groups": recipe.head.groups, "active": recipe.head.active},
        "tree": dataclasses.asdict(assembled.engine.shape),
        "device": device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["coral", *sys.argv[1:]]),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """What a reader calls the machine: the GPU, or the processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return f"{names[0].strip()} x {len(names)}"
    return platform.processor() or platform.machine()
