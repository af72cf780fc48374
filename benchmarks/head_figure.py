"""docs/head.svg from results/head.json: how much of tau a head keeps, by how much of the vocabulary it reads.

pip install matplotlib; python -m benchmarks.head_figure
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.record import RESULTS

METHODS = {
    "64 groups": ("#e9c46a", "-"),
    "128 groups": ("#f4a261", "-"),
    "256 groups": ("#2a9d8f", "-"),
    "cooccurrence": ("#2a9d8f", "-"),
    "kmeans": ("#e76f51", "-"),
    "frequency": ("#e9c46a", "-"),
    "id": ("#8d99ae", "-"),
    "static": ("#6d597a", "--"),
}
"""Colours that hold on a white and on a dark page; what has no router is dashed."""


def main() -> None:
    rows = [row for row in json.loads((RESULTS / "head.json").read_text())["rows"] if "tau_kept" in row]
    rows.sort(key=lambda row: row["part"] == "pico")
    sizes = {row["part"]: row["rows_read"] for row in rows if row["method"] == "full"}
    shown = [(part, domain) for part in sizes for domain in ("seen", "unseen")]
    pyplot.rcParams.update({"svg.hashsalt": "coral", "font.size": 10})
    figure, panels = pyplot.subplots(1, len(shown), figsize=(2.6 * len(shown), 3.2), sharey=True, facecolor="white")
    for panel, (part, domain) in zip(panels, shown, strict=True):
        for method, (colour, line) in METHODS.items():
            own = [row for row in rows if (row["part"], row["domain"], row["method"]) == (part, domain, method)]
            if not own:
                continue
            own.sort(key=lambda row: row["rows_read"])
            shares = [100 * row["rows_read"] / sizes[part] for row in own]
            panel.plot(shares, [100 * row["tau_kept"] for row in own], line, color=colour, marker="o", label=method)
        panel.axhline(100, color="black", linewidth=0.5)
        panel.set_xscale("log", base=2)
        panel.set_xticks([6.25, 12.5, 25], ["1/16", "1/8", "1/4"])
        panel.set(xlabel="rows read", title=f"{part},\n{sizes[part]:,} tokens,\n{domain} domains")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("% of the full head's tau")
    for panel in (panels[0], panels[-2]):  # pico's two are last: their methods are others
        panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path = Path(__file__).parents[1] / "docs" / "head.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(path.name)


if __name__ == "__main__":
    main()
