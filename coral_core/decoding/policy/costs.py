"""What the parts of a round cost on one device, in plain steps. Measured in measure.py, spent in adaptive.py.

A plain step is a target forward of one row with all that a round does around it; costs are ratios to it, so that a tree
depends on how a machine is built and not on how busy it was.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Ratios to a plain step, by number of rows; between the measured numbers they are read off a line."""

    step_s: float
    """Seconds of the plain step: no tree depends on it, only whether the costs are measured again (measure.py)."""
    verify: Mapping[int, float]
    """A target forward of so many rows, root included, with masks, picks and kept rows."""
    level: Mapping[int, float]
    """One more level of the tree, with so many nodes expanded: the drafter's layer, its head, the tree."""
    base: float
    """What any draft takes: feeding the drafter, the root's candidates, choosing the nodes."""

    def verified(self, nodes: int) -> list[float]:
        """The cost of verifying 0, 1, … `nodes` drafted nodes."""
        return [_read_off(self.verify, rows) for rows in range(1, nodes + 2)]

    def expanded(self, width: int) -> list[float]:
        """The cost of a level with 0, 1, … `width` nodes; no level costs nothing."""
        return [0.0, *(_read_off(self.level, rows) for rows in range(1, width + 1))]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Costs":
        """Raises KeyError, TypeError or ValueError for what is no dict of these fields."""

        def curve(key: str) -> dict[int, float]:
            return {int(rows): float(cost) for rows, cost in raw[key].items()}

        found = cls(step_s=float(raw["step_s"]), verify=curve("verify"), level=curve("level"), base=float(raw["base"]))
        numbers = [found.step_s, found.base, *found.verify.values(), *found.level.values()]
        if not (1 in found.verify and 1 in found.level and all(math.isfinite(n) and n >= 0 for n in numbers)):
            raise ValueError("no costs")
        return found


def rising(costs: list[float]) -> list[float]:
    """The nearest curve that never falls: neighbours out of order, which only noise explains, share their mean.

    [1.0, 1.4, 1.2, 2.0] is [1.0, 1.3, 1.3, 2.0].
    """
    runs: list[list[float]] = []
    for cost in costs:
        runs.append([cost])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            last = runs.pop()
            runs[-1] += last
    return [value for run in runs for value in [_mean(run)] * len(run)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _read_off(curve: Mapping[int, float], rows: int) -> float:
    """The curve at `rows`, on a line between its two nearest points; beyond the last, on the line of the last two."""
    points = sorted(curve.items())
    if len(points) == 1:
        return points[0][1] * rows
    pairs = list(itertools.pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if rows <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
