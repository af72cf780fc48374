"""What the rows of benchmarks/methods.py come to: each method's tokens per round, and their ratios.

Axes: N row: a seed, P prompt.
"""

from typing import Any

import numpy as np

from benchmarks.paired import Counts, ratio, ratio_ci95, tau, tau_ci95

METHODS = ("eagle2", "hass", "coral")
Row = dict[str, Any]
"""One training: its part, name and seed, and the tokens and rounds of each prompt."""


def is_comparison(part: str) -> bool:
    """Whether a part measures all three methods; the others change one choice of CORAL."""
    return part in ("methods", "early") or part.startswith("equal time")


def counts(found: list[Row], part: str, name: str, seeds: list[int]) -> Counts:
    """(tokens_NP, rounds_NP) of a method's rows, in the order of `seeds`."""
    by_seed = {row["seed"]: row for row in found if (row["part"], row["name"]) == (part, name)}
    tokens_NP, rounds_NP = (np.array([by_seed[seed][what] for seed in seeds], float) for what in ("tokens", "rounds"))
    return tokens_NP, rounds_NP


def compare(found: list[Row], part: str) -> dict[str, Any]:
    """The figures of one comparison: each method on its own seeds, each ratio on the seeds that both methods have."""
    seen = {
        method: sorted(row["seed"] for row in found if (row["part"], row["name"]) == (part, method))
        for method in METHODS
    }
    own = {method: counts(found, part, method, seeds) for method, seeds in seen.items() if seeds}
    told: dict[str, Any] = {"tau": {method: tau(mine) for method, mine in own.items()}}
    told["tau_ci95"] = {method: tau_ci95(mine) for method, mine in own.items()}
    ratios: dict[str, Any] = {}
    for one, other in (("coral", "eagle2"), ("hass", "eagle2"), ("coral", "hass")):
        if both := sorted({*seen[one]} & {*seen[other]}):
            pair = counts(found, part, one, both), counts(found, part, other, both)
            ratios |= {f"{one}_over_{other}": ratio(*pair), f"{one}_over_{other}_ci95": ratio_ci95(*pair)}
    if not own:
        return {}
    trained = {method: len(seen[method]) for method in own}
    return told | ratios | {"seeds": trained, "prompts": next(iter(own.values()))[0].shape[1]}


def shown(found: list[Row]) -> list[Row]:
    """Rows for the results: counts summed over prompts, and an ablation's ratio to CORAL's early row of its seed."""
    table = []
    for row in found:
        own = counts([row], row["part"], row["name"], [row["seed"]])
        line = {key: value for key, value in row.items() if key not in ("tokens", "rounds")}
        line |= {"tokens": sum(row["tokens"]), "rounds": sum(row["rounds"]), "tau": tau(own), "tau_ci95": tau_ci95(own)}
        if not is_comparison(row["part"]):
            coral = counts(found, "early", "coral", [row["seed"]])
            line |= {"over_coral": ratio(own, coral), "over_coral_ci95": ratio_ci95(own, coral)}
        table.append(line)
    return table
