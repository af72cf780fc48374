"""Sampling: what drafts gain from knowing the noise, and what the noise costs over a large vocabulary.

    python -m benchmarks.sampling                    # pico with its own drafter; some three minutes on two cores

coupled: tokens per round at temperature 0.7 and 1 where candidates are ranked with the noise that will pick, over those
where they are ranked by the drafter's probabilities alone; the answers are the same. cost: judging a tree at
temperature 1 over judging it greedily, for Qwen2.5-7B's vocabulary, beside the least that a round of that model takes
here: reading its weights once in bfloat16.

[RECIPE.YAML] [section.key=value ...] choose target and tree, as in every command; the tree is fixed, so that tau does
not depend on costs.
Axes: N row (of a draft level, or a noise seed), P prompt, C candidate token, M tree row, V vocabulary.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode_steps import in_turns, measure_machine
from benchmarks.paired import Counts, ratio, ratio_ci95, tau
from benchmarks.record import record
from coral_cli.options import read_recipe
from coral_core.bench.questions import held_out
from coral_core.bench.race import first_prompt
from coral_core.decoding import tree
from coral_core.decoding.engine import Engine
from coral_core.decoding.sampling import Sampler
from coral_core.recipe.schema import Recipe
from coral_core.run import Run
from coral_core.target.load import load_target

TEMPERATURES = (0.7, 1.0)
SEEDS = 3
VOCABULARY, WEIGHTS = 151_936, 7_615_616_512
"""Qwen2.5-7B-Instruct's logits and parameters."""
ROWS, LEVELS = 11, 5
"""Of the judged tree: a processor's. Rows of one depth share their noise."""
STEPS = 20
"""Rounds that are judged in one timed call, each at the positions where the one before may have left off."""
ACCEPTED = 3


@dataclasses.dataclass(frozen=True)
class Uncoupled(Sampler):
    """Draws as a Sampler, and ranks candidates as if the noise were not known."""

    def rank(self, logit_NC: torch.Tensor, token_C: torch.Tensor, noise_V: torch.Tensor | None) -> torch.Tensor:
        return (self._warpers(None, logit_NC.float()) * self.sharpness).log_softmax(-1)


def coupled(engine: Engine, prompts: list[list[int]], tokens: int) -> Iterator[dict[str, Any]]:
    """A row per temperature; prompts and noise seeds are paired."""
    for temperature in TEMPERATURES:
        counts: dict[type[Sampler], Counts] = {}
        answers: dict[type[Sampler], list[list[int]]] = {}
        for kind in (Sampler, Uncoupled):
            tokens_NP, rounds_NP = np.zeros((2, SEEDS, len(prompts)))
            answers[kind] = []
            for seed, place in np.ndindex(SEEDS, len(prompts)):
                events = list(engine.decode(prompts[place], kind(temperature=temperature, seed=seed), tokens))
                answers[kind].append([token for event in events for token in event.new_ids])
                tokens_NP[seed, place] = sum(len(event.new_ids) for event in events[1:])
                rounds_NP[seed, place] = len(events) - 1
            counts[kind] = tokens_NP, rounds_NP
        first, second = counts[Sampler], counts[Uncoupled]
        yield {
            "part": "coupled",
            "temperature": temperature,
            "tau": tau(first),
            "tau_uncoupled": tau(second),
            "coupled_over_uncoupled": ratio(first, second),
            "coupled_over_uncoupled_ci95": ratio_ci95(first, second),
            "answers": len(answers[Sampler]),
            "equal": sum(a == b for a, b in zip(answers[Sampler], answers[Uncoupled], strict=True)),
        }


def cost(device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of a judgement, drawn and greedy, and of reading a 7B model's weights."""
    generator = torch.Generator().manual_seed(0)
    logits_MV = torch.randn(ROWS, VOCABULARY, generator=generator).to(device)
    parent_M = (torch.arange(ROWS, device=device) - 1).clamp_min(0) // 2
    depth_M = torch.arange(ROWS, device=device).clamp_max(LEVELS)
    draft = tree.Draft(
        token_M=torch.arange(ROWS, device=device),
        parent_M=parent_M,
        depth_M=depth_M,
        sees_MM=tree.ancestry(parent_M, LEVELS),
        score_M=torch.zeros(ROWS, device=device),
        levels=LEVELS,
    )

    def judge(temperature: float) -> None:
        sampler = Sampler(temperature=temperature)
        for step in range(STEPS):
            sampler.judge(draft, logits_MV, 100 + ACCEPTED * step)

    seconds = in_turns({"drawn": lambda: judge(1.0), "greedy": lambda: judge(0.0)}, device, repeats)
    read_s = WEIGHTS * 2 / measure_machine(device, torch.bfloat16, 1 << 30).bytes_per_s
    sampling_s = (seconds["drawn"] - seconds["greedy"]) / STEPS
    return {
        "part": "cost",
        "device": device.type,
        "vocabulary": VOCABULARY,
        "rows": ROWS,
        "sampling_ms": 1e3 * sampling_s,
        "least_round_ms": 1e3 * read_s,
        "share_of_round": sampling_s / (sampling_s + read_s),
    }


def bench(recipe: Recipe, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    target, run = load_target(recipe.target), options.runs / recipe.name
    engine = Run(recipe, run).engine(target)
    questions = held_out(run, recipe.target.model)[: options.prompts]
    yield from coupled(engine, [first_prompt(target, question) for question in questions], options.tokens)
    yield cost(target.device, options.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.YAML SECTION.KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--prompts", type=int, default=32, help="held-out ones")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--repeats", type=int, default=9, help="of each timed call")
    options = parser.parse_args()
    recipe = read_recipe(options.arguments)
    recipe = dataclasses.replace(recipe, decode=dataclasses.replace(recipe.decode, tree="fixed"))
    rows = []
    for row in bench(recipe, options):
        rows.append(row)
        print(json.dumps(row), flush=True)
    *couplings, priced = rows
    figures = {
        "coupled_over_uncoupled": {str(row["temperature"]): row["coupled_over_uncoupled"] for row in couplings},
        "coupled_over_uncoupled_ci95": {
            str(row["temperature"]): row["coupled_over_uncoupled_ci95"] for row in couplings
        },
        "answers_equal": all(row["equal"] == row["answers"] for row in couplings),
        "sampling_share_of_round": priced["share_of_round"],
    }
    print(json.dumps(figures, indent=1), record("sampling", figures, rows), sep="\n")


if __name__ == "__main__":
    main()
