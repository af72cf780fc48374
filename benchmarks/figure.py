"""docs/pico.svg from results/pico.json: how deep drafts are accepted, and where the time of a round goes.

pip install matplotlib; python -m benchmarks.figure
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.record import RESULTS

PHASES = {"draft": "#e76f51", "head": "#f4a261", "verify": "#2a9d8f", "accept": "#457b9d", "other": "#8d99ae"}
"""Colours that hold on a white and on a dark page."""


def main() -> None:
    rows = [row for row in json.loads((RESULTS / "pico.json").read_text())["rows"] if row["temperature"] == 0]
    pyplot.rcParams.update({"svg.hashsalt": "coral", "font.size": 10})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), facecolor="white")
    for row in rows:
        depths = range(1, len(row["accepted_by_depth"]) + 1)
        left.plot(depths, [100 * share for share in row["accepted_by_depth"]], marker="o", label=row["bench"])
    left.set(xlabel="depth of the draft", ylabel="% of rounds accepted so far", ylim=(0, 100))
    left.legend(frameon=False)
    begun = [0.0] * len(rows)
    for phase, colour in PHASES.items():
        spent = [1e3 * row["seconds_by_phase"].get(phase, 0.0) / row["rounds"] for row in rows]
        right.barh([row["bench"] for row in rows], spent, left=begun, color=colour, label=phase)
        begun = [a + b for a, b in zip(begun, spent, strict=True)]
    plain = [1e3 / row["baseline_tokens_per_s"] for row in rows]
    right.plot(plain, range(len(rows)), "k|", markersize=18, label="one plain step")
    right.set(xlabel="ms of one round")
    right.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = Path(__file__).parents[1] / "docs" / "pico.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(path.name)


if __name__ == "__main__":
    main()
