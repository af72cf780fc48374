"""The grouped head: how fast a step is, how much of tau it keeps, what it gains end to end.

    python -m benchmarks.head --questions DIR --corpora DIR [--part micro] [--part pico] [--run runs/NAME ...]

micro: the head step alone at the shapes of Llama-2-7B, Llama-3-8B and Qwen2.5-7B, on the CPU and on a GPU where there
is one. pico: every way to group on the embedded target with its own drafter. --run: a real model's run with its data
and drafter, in numbers of groups and of active ones. Each replaces its own rows of results/head.json, so that one that
fails loses nothing; then `python -m benchmarks.head_figure` draws docs/head.svg.

`seen` prompts are of the kind that the frequency count, the groups, the router and the drafter learnt from; `unseen`
ones are of other domains.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import head_micro, head_race
from benchmarks.record import RESULTS, record
from coral_cli.console import progress_bars
from coral_core.bench.probe import Probe
from coral_core.bench.questions import from_file
from coral_core.bench.race import first_prompt
from coral_core.data.job import Job
from coral_core.data.stage import prepare
from coral_core.drafter.load import load_drafter
from coral_core.drafter.model import Drafter
from coral_core.embedded import FOLDER as PICO
from coral_core.grouping.stage import Trial
from coral_core.progress import Progress
from coral_core.recipe.loader import load_recipe
from coral_core.recipe.schema import Recipe
from coral_core.store.store import Store
from coral_core.target.load import load_target
from coral_core.target.target import Target
from coral_core.target.template import prompt_ids
from recipes.pico import corpora

TREE = ["decode.tree=fixed", "decode.draft_depth=6", "decode.draft_nodes=16", "decode.draft_topk=4"]
CONTROLS = ("full", "static", "id", "cooccurrence, the paper's router")
"""What the best of the others is quoted beside: all rows, a list of equal size, groups in the order of ids, and the
paper's router, which coral does not train."""
UNSEEN = ("fairytaleqa", "flan_cot_creak", "flan_cot_ecqa", "flan_cot_qasc", "sgd")
"""Corpora of which the real models' prompts (recipes/real/prompts.py) hold nothing."""


def micro(options: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for row in head_micro.measure(devices, options.shape or list(head_micro.SHAPES)):
        print(json.dumps(row), flush=True)
        yield row


def pico(options: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    recipe = recipe_of(options, "pico", PICO / "target", f"data.max_samples={options.samples}")
    target = load_target(recipe.target)
    store = prepare(Job(recipe, target, options.work / "pico" / "data"), progress)
    drafter = load_drafter(PICO / "drafter").float()
    questions = [from_file(options.questions / f"{name}.jsonl") for name in ("mt-bench", "humaneval-80", "gsm8k-80")]
    asked = [question for row in zip(*questions, strict=False) for question in row]
    unseen = [first_prompt(target, question) for question in asked]
    parts = Parts(recipe, target, store, drafter, unseen)
    yield from compare("pico", parts, head_race.by_clustering, options, progress)


def real(folder: Path, options: argparse.Namespace, progress: Progress) -> Iterator[dict[str, Any]]:
    recipe = load_recipe(folder / "recipe.yaml", [*TREE, f"decode.max_new_tokens={options.tokens}"])
    target, store = load_target(recipe.target), Store.open(folder / "data")
    drafter = load_drafter(folder / "drafter").float()
    dialogues = (corpora.read(options.corpora, name) for name in UNSEEN)
    asked = [dialogue[:1] for row in zip(*dialogues, strict=False) for dialogue in row][: 2 * options.tau_prompts]
    unseen = [prompt_ids(target.tokenizer, messages) for messages in asked]
    parts = Parts(recipe, target, store, drafter, unseen)
    yield from compare(recipe.name, parts, head_race.by_groups, options, progress)


def recipe_of(options: argparse.Namespace, name: str, folder: Path, *keys: str) -> Recipe:
    """A recipe for one target of the benchmark; float32 on the CPU unless there is a GPU."""
    head = ["head.groups=256", "head.active=32", "head.router_steps=600"]
    data = ["data.holdout=48", "data.max_new_tokens=64", "data.max_length=256", "data.batch_size=32"]
    limit = f"decode.max_new_tokens={options.tokens}"
    return load_recipe(None, [f"name={name}", f"target.model={folder}", *TREE, *head, *data, limit, *keys])


@dataclasses.dataclass(frozen=True)
class Parts:
    """One target with what was learnt of it, and prompts of other domains."""

    recipe: Recipe
    target: Target
    store: Store
    drafter: Drafter
    unseen: list[list[int]]


def compare(
    part: str, parts: Parts, routed: head_race.Routed, options: argparse.Namespace, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Rows of every head on prompts of the known kind and of other domains."""
    recipe, target, store = parts.recipe, parts.target, parts.store
    trial = Trial.of(recipe, store, parts.drafter, progress)
    racers = [*head_race.controls(trial, target.lent), *routed(trial, target.lent)]
    room = target.max_positions - options.tokens
    for domain, prompts in (("seen", store.holdout_prompts), ("unseen", parts.unseen)):
        many = [prompt for prompt in prompts if len(prompt) < min(room, 400)][: options.tau_prompts]
        some = many[: options.prompts]
        probe = Probe(recipe, target, some, progress)
        said = head_race.predictions(probe, trial, racers) if domain == "seen" else {}
        counted = head_race.taus(probe, trial, racers, many)
        for row, own in zip(head_race.race(probe, trial, racers, some), counted, strict=True):
            row |= own | {"part": part, "domain": domain, "predicted": said.get((row["method"], row["share"]))}
            print(json.dumps(row), flush=True)
            yield row


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the README quotes; a part that has not been run leaves its figures out."""
    found: dict[str, Any] = {}
    eighth = [row for row in rows if row["part"] == "micro" and row["device"] == "cpu" and row["share"] == 8]
    for dtype in ("float32", "bfloat16"):
        steps = [row for row in eighth if row["dtype"] == dtype and row["head"] == "grouped"]
        if steps:
            suffix = "" if dtype == "float32" else f"_{dtype}"
            found[f"head_time_ratio_eighth{suffix}"] = max(row["of_full"] for row in steps)
            found[f"head_time_over_floor_eighth{suffix}"] = max(row["over_floor"] for row in steps)
    for part in sorted({row["part"] for row in rows} - {"micro"}):
        suffix = f"_{part}"
        raced = [row for row in rows if row["part"] == part and "tau_kept" in row]
        for share, name in ((8, "eighth"), (16, "sixteenth")):
            best = pooled(raced, share)
            if not best:
                continue
            routed = max(best.keys() - CONTROLS, key=lambda method, best=best: best[method]["tau_kept"])  # type: ignore[misc]
            found[f"tau_kept_{name}{suffix}"] = best[routed]["tau_kept"]
            found[f"tau_kept_static_{name}{suffix}"] = best["static"]["tau_kept"]
            found[f"tau_kept_static_{name}_unseen{suffix}"] = best["static"]["unseen"]
            found[f"tau_kept_{name}_unseen{suffix}"] = best[routed]["unseen"]
            found[f"end_to_end_gain_{name}{suffix}"] = best[routed]["gain"]
            found[f"end_to_end_gain_static_{name}{suffix}"] = best["static"]["gain"]
            found[f"best_{name}{suffix}"] = routed
        # Tokens per round from many prompts, seconds per round from those that were timed.
        errors = [
            abs(row["predicted"]["speedup"] * row["round_of_full"] / row["tau_kept"] - 1)
            for row in raced
            if row["predicted"]
        ]
        if errors:
            found[f"prediction_error_worst{suffix}"] = max(errors)
    return found


def pooled(raced: list[dict[str, Any]], share: int) -> dict[str, dict[str, float]]:
    """By method, at one share: tau kept and gain over both kinds of prompts, geometric means."""
    found: dict[str, dict[str, float]] = {}
    for row in raced:
        if row["share"] == share:
            own = found.setdefault(row["method"], {"tau_kept": 1.0, "gain": 1.0})
            own["tau_kept"] *= row["tau_kept"] ** 0.5
            own["gain"] *= row["gain"] ** 0.5
            own[row["domain"]] = row["tau_kept"]
    return found


PARTS: dict[str, Callable[[argparse.Namespace, Progress], Iterator[dict[str, Any]]]] = {"micro": micro, "pico": pico}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=list(PARTS), default=[])
    parser.add_argument("--run", action="append", type=Path, default=[], help="runs/NAME, with data and drafter")
    parser.add_argument("--shape", action="append", choices=list(head_micro.SHAPES), help="of micro; all by default")
    parser.add_argument("--prompts", type=int, default=10, help="of each kind, to time rounds on")
    parser.add_argument("--tau-prompts", type=int, default=48, help="of each kind, to count rounds on")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--samples", type=int, default=800, help="dialogues of pico to learn from")
    options = parser.parse_args()
    if not options.part and not options.run:
        parser.error("name a --part or a --run")
    old = json.loads((RESULTS / "head.json").read_text())["rows"] if (RESULTS / "head.json").exists() else []
    with tempfile.TemporaryDirectory() as scratch, progress_bars() as progress:
        options.work = Path(scratch)
        wanted = [PARTS[part](options, progress) for part in options.part]
        for found in [*wanted, *(real(run, options, progress) for run in options.run)]:
            rows = list(found)
            old = [row for row in old if row["part"] != rows[0]["part"]] + rows
            print(record("head", figures(old), old, rows[0]["part"]))


if __name__ == "__main__":
    main()
