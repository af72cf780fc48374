"""One evaluation: question sets raced, finished questions kept on disk as they come, numbers published at the end.

eval/results.json  results.md  results.tex  report.html  BENCH.jsonl (every answer of every lane)
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from coral_core.artifacts import Manifest, fingerprint, stage, versions, write_text
from coral_core.bench.baseline import plain_lanes
from coral_core.bench.distribution import check_distribution
from coral_core.bench.grade import grade
from coral_core.bench.methods import Method, rows_read
from coral_core.bench.metrics import plain_speeds, question_speedups, summarise
from coral_core.bench.questions import Bench
from coral_core.bench.race import PLAIN, Lane, Racers, Turn, fitting, race
from coral_core.bench.samples import samples
from coral_core.decoding.measure import device_name
from coral_core.progress import Progress
from coral_core.recipe.loader import to_mapping
from coral_core.recipe.schema import Recipe
from coral_core.report.page import page
from coral_core.report.tables import latex, markdown
from coral_core.run import sampler
from coral_core.target.target import Target

SCHEMA = 1
PROBES = 3
"""Questions on which what stands beside the race is measured."""
SETTINGS = "settings.json"
"""What an evaluation is of; beside the rows, for who looks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    recipe: Recipe
    target: Target
    methods: Sequence[Method]
    benches: Sequence[Bench]
    run_code: bool = False
    """Run HumanEval's programs (sandbox.py)."""

    def settings(self) -> dict[str, Any]:
        """Everything that the rows on disk depend on."""
        return {
            "seed": self.recipe.seed,
            "decode": dataclasses.asdict(self.recipe.decode),
            "target": self.target.fingerprint,
            "dtype": str(self.target.dtype),
            "device": device_name(self.target.device),
            "threads": torch.get_num_threads(),
            "methods": {method.name: method.facts for method in self.methods},
            "questions": {
                bench.name: f"{len(bench.questions)} with fingerprint {_fingerprint(bench)}" for bench in self.benches
            },
        }


def _fingerprint(bench: Bench) -> str:
    return fingerprint([dataclasses.asdict(question) for question in bench.questions])


def evaluate(plan: Plan, run: Path, progress: Progress) -> dict[str, Any]:
    """Race every bench and publish RUN/eval; results.json's object is returned.

    An interrupted evaluation of the same thing goes on behind its last finished question (`interrupted` tells). It
    works in a folder of its own, so that one of other things leaves it as it is.
    """
    settings = plan.settings()
    with stage(run / "eval", fingerprint(settings), work=_work(run, settings)) as work:
        write_text(work / SETTINGS, json.dumps(settings, indent=1) + "\n")
        sections: dict[str, dict[str, Any]] = {method.name: {} for method in plan.methods}
        charts: dict[str, Any] = {}
        for bench in plan.benches:
            raced = _race_bench(plan, bench, work, progress)
            for method, numbers in _numbers(plan, raced).items():
                sections[method][bench.name] = numbers
            charts[bench.name] = _for_charts(plan, raced)
        results = _results(plan, sections)
        _publish(plan, run, work, results, charts, settings)
    return results


def interrupted(plan: Plan, run: Path) -> str:
    """What `evaluate` will do with an interrupted evaluation in RUN, for the user; '' where there is none."""
    kept = (_work(run, plan.settings()) / SETTINGS).exists()
    return f"goes on with the interrupted evaluation in {run}" if kept else ""


def _work(run: Path, settings: dict[str, Any]) -> Path:
    return run / f".eval-{fingerprint(settings)}.partial"


@dataclasses.dataclass(frozen=True)
class _Raced:
    """One bench, done."""

    bench: Bench
    probes: list[list[int]]
    """Prompts that fit the context, for what is measured beside the race."""
    questions: list[list[Turn]]


def _race_bench(plan: Plan, bench: Bench, work: Path, progress: Progress) -> _Raced:
    pick, limit = sampler(plan.recipe), plan.recipe.decode.max_new_tokens
    probes = fitting(plan.target, bench.questions)[:PROBES]
    rows = work / f"{bench.name}.jsonl"
    done = _finished(rows)
    engines = {method.name: method.engine for method in plan.methods}
    racers = Racers(plan.target, engines, pick, limit, plain_lanes(plan.target, pick, limit))
    stage_name, total = f"{bench.name} T={plan.recipe.decode.temperature:g}", len(bench.questions)
    progress(stage_name, len(done), total, {})
    with rows.open("a", encoding="utf-8") as file:
        for turns in race(racers, bench.questions, len(done)):
            file.write(json.dumps([dataclasses.asdict(turn) for turn in turns]) + "\n")
            file.flush()
            done.append(turns)
            so_far = summarise(done, plan.methods[0].name, draws=0)
            numbers = {"tau": so_far["tokens_per_round_micro"], "speedup": so_far["speedup"]}
            progress(stage_name, len(done), total, {key: value for key, value in numbers.items() if value is not None})
    return _Raced(bench, probes, done)


def _numbers(plan: Plan, raced: _Raced) -> dict[str, dict[str, Any]]:
    """Per method, what results.json says of one bench."""
    bench, target = raced.bench, plan.target
    asked = sum(len(question.turns or ("",)) for question in bench.questions)
    graded = grade(bench.questions, raced.questions, _text(target), run_code=plan.run_code)
    pick = sampler(plan.recipe)
    own = f"{PLAIN} {_dtype(target)}"
    speeds = {own if name == PLAIN else name: speed for name, speed in plain_speeds(raced.questions).items()}
    found = {}
    for method in plan.methods:
        summary = summarise(raced.questions, method.name)
        found[method.name] = {
            "bench": bench.name,
            "temperature": plan.recipe.decode.temperature,
            "seed": plan.recipe.seed,
            "baseline": next(iter(speeds), own),
            "plain_decoders": speeds,
            **summary,
            "turns_too_long": asked - summary["turns"],
            "rows_read": rows_read(method.engine, raced.probes[0]),
            "answers": graded and graded.of(method.name),
            "distribution": check_distribution(method.engine, pick, raced.probes) if pick.temperature > 0 else None,
        }
    return found


def _text(target: Target) -> Callable[[list[int]], str]:
    return lambda ids: str(target.tokenizer.decode(ids, skip_special_tokens=True))


def _for_charts(plan: Plan, raced: _Raced) -> dict[str, Any]:
    names = [method.name for method in plan.methods]
    return {
        "speedups": {name: question_speedups(raced.questions, name) for name in names},
        "samples": samples(plan.target, raced.bench, raced.questions, names[0]),
    }


def _results(plan: Plan, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The first method stands at the top; others, each in the same form, in `others`."""
    target = plan.target
    first, *others = ({**method.facts, "benches": sections[method.name]} for method in plan.methods)
    return {
        "schema": SCHEMA,
        "target": {
            "model": plan.recipe.target.model,
            "fingerprint": target.fingerprint,
            "vocabulary": target.lent.head_VD.shape[0],
        },
        "device": device_name(target.device),
        "dtype": _dtype(target),
        "threads": torch.get_num_threads(),
        "max_new_tokens": plan.recipe.decode.max_new_tokens,
        "command": shlex.join(["coral", *sys.argv[1:]]),
        "versions": versions(),
        **first,
        "others": others,
    }


def _publish(
    plan: Plan, run: Path, work: Path, results: dict[str, Any], charts: dict[str, Any], settings: dict[str, Any]
) -> None:
    write_text(work / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(work / "results.md", markdown(results))
    write_text(work / "results.tex", latex(results))
    trained_here = any(method.folder == run and method.facts["drafter"]["data"] for method in plan.methods)
    log = run / "log.jsonl" if trained_here else None
    write_text(work / "report.html", page(plan.recipe.name, results, charts, log))
    Manifest(
        kind="eval",
        fingerprint=fingerprint(settings),
        inputs={"target": plan.target.fingerprint, "drafter": plan.methods[0].facts["drafter"]["fingerprint"]},
        recipe=to_mapping(plan.recipe),
        facts={"benches": [bench.name for bench in plan.benches], "methods": [method.name for method in plan.methods]},
    ).sealed(work).write(work)


def _dtype(target: Target) -> str:
    return str(target.dtype).removeprefix("torch.")


def _finished(path: Path) -> list[list[Turn]]:
    """The questions that an interrupted run has finished; from a line on that was cut or damaged, none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    done: list[list[Turn]] = []
    try:
        for line in lines:
            if not line.endswith("\n"):
                break
            done.append([_turn(turn) for turn in json.loads(line)])
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    if len(done) < len(lines):
        write_text(path, "".join(lines[: len(done)]))
    return done


def _turn(row: dict[str, Any]) -> Turn:
    return Turn(**{**row, "lanes": {name: Lane(**lane) for name, lane in row["lanes"].items()}})
