"""docs/results.md, and the README's table, from the files of benchmarks/results: no figure is typed by hand.

    python -m benchmarks.page

A test compares both with what this prints, so that a file that is measured anew is shown, or the test fails.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import real_figures
from benchmarks.record import RESULTS
from coral_core.artifacts import write_text
from coral_core.report.tables import table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin: real, python -m benchmarks.page -->", "<!-- end -->"
"""Between these two lines of the README stands the table of real models."""
TITLES = {"eagle2": "EAGLE-2", "hass": "HASS", "coral": "CORAL"}
METHODS = {
    **{f"{name}{real_figures.STEPS}": f"{title}, equal steps" for name, title in TITLES.items()},
    **TITLES,
    real_figures.LONG: "CORAL, trained longer",
}
ENOUGH = 10
"""Questions a bench below which the README leaves a training's rows out; docs/results.md shows them."""
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
ABOUT = {
    "real": "Real chat models: EAGLE-2, HASS and CORAL, full and grouped head, against the fastest plain decoding.",
    "real-avx2": "The same race on a processor without bfloat16 (Zen 3, AVX2), with the drafter that ships. In "
    "bfloat16 plain decoding is fastest there, and prompts and trees are slowest.",
    "exact": "Whether a speculative answer has the bits of the plain one, and what that costs.",
    "pico": "pico, the embedded model of 22 million parameters, with the drafter and the head that ship with coral.",
    "decode": "A race of every decoder on the same held-out prompts of pico, in turns, and what a round's parts cost.",
    "decode-gpu": "A target of Llama-3-8B's shape with random weights on a GPU: what a round costs, in plain steps.",
    "seat": "One answer at a time, before and after decoding was rebuilt: tokens per second of two checkouts.",
    "serve": "`coral serve` with several clients at once.",
    "methods": "EAGLE-2, HASS and CORAL on pico, from the same data: in equal time, and in equal steps.",
    "methods-smollm2": "EAGLE-2, HASS and, on EAGLE-3.1's shape, CORAL on SmolLM2-135M in equal time.",
    "methods-smollm2-steps": "The three methods on SmolLM2-135M, all on EAGLE-2's shape, in equal steps, three seeds; "
    "feature noise of 0.02, and losses over 6,144 candidates of the vocabulary.",
    "methods-qwen": "EAGLE-2 and, on EAGLE-3.1's shape, CORAL on Qwen2.5-Coder-0.5B in equal time, one seed.",
    "eagle3": "EAGLE-3's shape against EAGLE-2's, step by step, on SmolLM2-135M.",
    "eagle3-pico": "The same on pico; stopped before equal time and the routed head.",
    "head": "The grouped head, by groups and active ones, against the full head and a list of frequent tokens, "
    "on text of the kind that groups, router and list have learnt from (seen) and on other text. Gain: tokens per "
    "second over the full head's, with the same trees of 16 nodes and 6 levels.",
    "train": "Training: tokens per second and memory against the eager reference.",
    "data": "Data: tapping, writing, bytes per token, fp8 against bfloat16.",
    "sampling": "Drafts that know the sampling noise, against drafts that do not.",
    "batch": "Several prompts at once.",
    "long_context": "Long contexts: memory per token, and a round's time.",
}
"""What each file holds, in the order of the page."""


def load(name: str) -> dict[str, Any]:
    """One file of results."""
    value: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return value


def results_page() -> str:
    """docs/results.md."""
    parts = [
        "# Results\n\nThis page is made by `python -m benchmarks.page` from the files in `benchmarks/results/`. Each "
        "section names the machine, the versions, the command and the date. Figures of different machines do not "
        "compare.\n"
    ]
    for name, about in ABOUT.items():
        if (RESULTS / f"{name}.json").exists():
            parts.append(section(name, about))
    return "\n".join(parts)


def section(name: str, about: str) -> str:
    """One file: what it is, where it was measured, its figures."""
    found = load(name)
    parts = found.get("parts", {"": found})
    made = [provenance(part if len(parts) > 1 else "", of) for part, of in parts.items()]
    shown = [TABLES[name](found["rows"])] if name in TABLES else []
    shown += [] if name == "pico" else [table(("figure", "value"), flat(found["figures"]))]
    return f"## {name}\n\n{about}\n\n" + "\n\n".join([*made, *shown]) + "\n"


def provenance(part: str, made: dict[str, Any]) -> str:
    """How a file, or a part of its rows, was made: the command, the machine, the versions and the date.

    A `note` says by hand where the command says less than the rows: it ran otherwise then, or was stopped.
    """
    machine, versions = made["machine"], made["versions"]
    # Records of before 2026-12 keep the instructions apart from the device's name.
    instructions = f", {machine['cpu_capability']}" if "cpu_capability" in machine else ""
    where = (
        f"{machine['device']}{instructions}, {machine['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {versions['git_commit'][:7]}; {made['date']}"
    )
    note = f"\n\n{made['note']}" if "note" in made else ""
    return (f"{part}: " if part else "") + f"`{made['command']}`\n\n{where}{note}"


def flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested figures as (dotted name, value); lists of two are intervals."""
    rows: list[tuple[str, str]] = []
    for key, value in figures.items():
        name = f"{prefix}{key}"
        rows += flat(value, f"{name}.") if isinstance(value, dict) else [(name, text(value))]
    return rows


def text(value: Any) -> str:
    """Four significant digits; an interval in brackets."""
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def pico_table(rows: list[dict[str, Any]]) -> str:
    """pico's benches as the README shows them."""
    header = ("bench", "T", "tau", "tokens/s", "fastest plain, tokens/s", "speedup", "answers equal to plain")
    return table(header, [pico_row(row) for row in rows])


def pico_row(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["speedup_ci95"]
    equal = row["lossless"]
    return (
        row["bench"],
        f"{row['temperature']:g}",
        f"{row['tokens_per_round_micro']:.2f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['baseline_tokens_per_s']:.0f} ({row['baseline']})",
        f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]",
        f"{equal['equal']} of {equal['checked']}",
    )


def real_table(rows: list[dict[str, Any]]) -> str:
    """Real models as the README shows them: tau with EAGLE-2's fixed tree, and the speed of the tree that pays."""
    benches = list(dict.fromkeys(row["bench"] for row in rows))
    lines = []
    for model, temperature in dict.fromkeys((row["model"], row["temperature"]) for row in rows):
        own = [row for row in rows if (row["model"], row["temperature"]) == (model, temperature)]
        for method, head in methods_and_heads(own):
            cells = [real_cell([row for row in own if row["bench"] == bench], method, head) for bench in benches]
            name = f"{METHODS.get(method, method)}, {head} head"
            lines.append((MODELS.get(model, model), f"{temperature:g}", name, *cells))
    return table(("model", "T", "method", *(f"{bench}: tau, speedup" for bench in benches)), lines)


def methods_and_heads(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """In the order of METHODS; several seeds of a method are one."""
    counted, _ = real_figures.parts(rows)
    found = dict.fromkeys((real_figures.method(row), row["head"]) for row in counted)
    return sorted(found, key=lambda one: (list(METHODS).index(one[0]) if one[0] in METHODS else len(METHODS), one[1]))


def real_cell(rows: list[dict[str, Any]], method: str, head: str) -> str:
    """Of one bench; a method that was counted and not raced has no speed."""
    counted, raced = real_figures.parts(rows)
    if not any((real_figures.method(row), row["head"]) == (method, head) for row in counted):
        return "-"

    def own(name: str) -> bool:
        return real_figures.drafts_with(name) == method and name.split()[1] == head

    raced = real_figures.last_race(raced, own, real_figures.made_of(counted, method))
    names = real_figures.lanes_of(raced)
    ours = [name for name in names if own(name)]
    plains = [name for name in names if real_figures.is_plain(name)]
    speedup = f", {real_figures.gain(raced, ours, plains):.2f}x" if ours else ""
    return f"{real_figures.tau_of(counted, method, head):.2f}{speedup}"


def counted_enough(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Races, and the counts of each training and temperature that were made on ENOUGH questions of every bench."""
    asked: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for row in real_figures.parts(rows)[0]:
        asked.setdefault(real_figures.question(row)[:3], {}).setdefault(row["bench"], set()).add(row["question"])
    enough = {among for among, by_bench in asked.items() if min(map(len, by_bench.values())) >= ENOUGH}
    return [row for row in rows if "lanes" in row or real_figures.question(row)[:3] in enough]


def eagle3_table(rows: list[dict[str, Any]]) -> str:
    """One line a training: tokens per round, and the share of rounds that accepted the draft of each depth."""
    deepest = max(len(row["accepted_by_depth"]) for row in rows)
    depths = [f"depth {depth}, %" for depth in range(1, deepest + 1)]
    lines = []
    for row in rows:
        shares = [f"{100 * share:.0f}" for share in row["accepted_by_depth"]]
        shares += ["0"] * (deepest - len(shares))
        low, high = row["tau_ci95"]
        part = "" if row["part"] == "shape" else f" ({row['part']})"
        lines.append((row["name"] + part, str(row["steps"]), f"{row['tau']:.3f} [{low:.2f}, {high:.2f}]", *shares))
    return table(("row", "steps", "tau", *depths), lines)


def head_table(rows: list[dict[str, Any]]) -> str:
    """One line a head and kind of text: what it keeps of the full head's tau, and its speed over the full head's."""
    lines = []
    for row in rows:
        if "tau_kept" in row:
            low, high = row["tau_kept_ci95"]
            kept = f"{row['tau_kept']:.3f} [{low:.2f}, {high:.2f}]"
            share = f"1/{row['share']}" if row["share"] > 1 else "all"
            where = (row["part"], row["domain"], row["method"], share)
            lines.append((*where, f"{row['tau']:.2f}", kept, f"{row['gain']:.2f}"))
    return table(("target", "text", "head", "rows read", "tau", "tau kept", "gain"), lines)


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "real": real_table,
    "real-avx2": real_table,
    "pico": pico_table,
    "head": head_table,
    "eagle3": eagle3_table,
    "eagle3-pico": eagle3_table,
}
"""Files that the page shows in a table of their own, beside their figures."""


def readme(text: str) -> str:
    """The README with its table as the file has it now."""
    before, _, rest = text.partition(BEGIN)
    shown = real_table(counted_enough(load("real")["rows"]))
    return f"{before}{BEGIN}\n{shown}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    write_text(ROOT / "docs" / "results.md", results_page())
    path = ROOT / "README.md"
    write_text(path, readme(path.read_text(encoding="utf-8")))
    print("docs/results.md, README.md")


if __name__ == "__main__":
    main()
