"""docs/methods.svg from results/methods*.json: tokens per round of drafters trained for the same time, by that time.

pip install matplotlib; python -m benchmarks.methods_figure
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.record import RESULTS

METHODS = {"eagle2": ("EAGLE-2", "#457b9d"), "hass": ("HASS", "#f4a261"), "coral": ("CORAL", "#e76f51")}
"""Colours that hold on a white and on a dark page."""
PANELS = {"methods": "pico", "methods-smollm2": "SmolLM2-135M"}


def main() -> None:
    pyplot.rcParams.update({"svg.hashsalt": "coral", "font.size": 10})
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(4.5 * len(PANELS), 3.2), facecolor="white")
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        budgets = json.loads((RESULTS / f"{name}.json").read_text())["figures"]["equal_time_budgets"].values()
        for method, (label, colour) in METHODS.items():
            own = sorted((b["seconds"], b["tau"][method], b["tau_ci95"][method]) for b in budgets if method in b["tau"])
            if own:
                seconds, taus, intervals = zip(*own, strict=True)
                reach = [[tau - low for tau, (low, _) in zip(taus, intervals, strict=True)]]
                reach += [[high - tau for tau, (_, high) in zip(taus, intervals, strict=True)]]
                panel.errorbar(seconds, taus, yerr=reach, color=colour, marker="o", capsize=3, label=label)
        panel.set_xscale("log")
        panel.set_xticks([b["seconds"] for b in budgets], [f"{b['seconds']:.0f}" for b in budgets])
        panel.minorticks_off()
        panel.set(xlabel="seconds of training, one quiet core", ylabel="tokens per round", title=title)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.tight_layout()
    path = Path(__file__).parents[1] / "docs" / "methods.svg"
    figure.savefig(path, metadata={"Date": None})
    print(path.name)


if __name__ == "__main__":
    main()
