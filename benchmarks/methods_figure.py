"""docs/methods.svg from results/methods*.json: tokens per round over the time of training, method by method.

pip install matplotlib; python -m benchmarks.methods_figure
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.record import RESULTS

FILES = {"methods": "pico", "methods-smollm2": "SmolLM2-135M"}
METHODS = {"eagle2": ("EAGLE-2", "#8d99ae"), "hass": ("HASS", "#f4a261"), "coral": ("CORAL", "#e76f51")}
"""Colours that hold on a white and on a dark page."""


def main() -> None:
    tables = {name: json.loads((RESULTS / f"{file}.json").read_text())["figures"] for file, name in FILES.items()}
    pyplot.rcParams.update({"svg.hashsalt": "coral", "font.size": 10})
    figure, panels = pyplot.subplots(1, len(tables), figsize=(4.2 * len(tables), 3.2), facecolor="white")
    for panel, (name, figures) in zip(panels, tables.items(), strict=True):
        budgets = sorted(figures["equal_time_budgets"].values(), key=lambda budget: budget["seconds"])
        seconds = [budget["seconds"] for budget in budgets]
        for method, (label, colour) in METHODS.items():
            found = [budget["tau"][method] for budget in budgets]
            panel.plot(seconds, found, color=colour, marker="o", label=label)
            low, high = zip(*(budget["tau_ci95"][method] for budget in budgets), strict=True)
            panel.fill_between(seconds, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_xscale("log")
        panel.set_xticks(seconds, [f"{value:,.0f}" for value in seconds], minor=False)
        panel.set_xticks([], minor=True)
        panel.set(xlabel="seconds of training, one core", ylabel="tokens per round", title=name)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path = Path(__file__).parents[1] / "docs" / "methods.svg"
    figure.savefig(path, metadata={"Date": None})
    print(path.name)


if __name__ == "__main__":
    main()
