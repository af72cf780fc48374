"""report.html: one file that needs nothing else. No scripts, no fonts, no requests; a policy in it forbids them.

Written for a phone first, light or dark as the reader's system is, and for screen readers: tables have headers, charts
have a sentence, colour is never the only sign.
"""

import datetime
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from coral_core.report import svg
from coral_core.report.tables import (
    DEFINITIONS,
    comparison,
    details,
    inside,
    mean,
    methods,
    notes,
    number,
    rows,
)

STYLE = Path(__file__).with_name("style.css")
DEEPEST = 6
"""Depths with a shade of their own; deeper tokens share the last."""
LOG_POINTS = 240
"""Points of a training curve, at most."""


def page(name: str, results: dict[str, Any], charts: dict[str, Any], log: Path | None) -> str:
    """The report of an evaluation of run `name`.

    `results` is results.json's object; `charts` holds per bench {speedups{method: {question: ratio}}, samples[]};
    `log` is the run's log.jsonl, which may be absent; None where no drafter here was trained in this run.
    """
    width = "half" if len(results["benches"]) == 1 else "whole"  # a single chart does not fill a line
    sections = [
        _section("results", "Results", _results(results)),
        _section("depth", "How deep drafts are accepted", _acceptance(results), width),
        _section("time", "Where a round's time goes", _phases(results), width),
        _section("questions", "Speedup of every question", _questions(results, charts), width),
        _section("rows", "Tokens per round against rows read", _rows_read(results), width),
        _section("training", "Training", _training(log)),
        _section("answers", "Answers, token by token", _answers(results, charts)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>coral eval: {escape(name)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n{_header(name, results)}\n<main>\n" + "\n".join(sections) + f"\n</main>\n{_footer(results)}\n"
        "</body>\n</html>\n"
    )


def _section(anchor: str, title: str, body: str, width: str = "whole") -> str:
    head = f'<section id="{anchor}" class="{width}" aria-labelledby="{anchor}-title">'
    return f'{head}\n<h2 id="{anchor}-title">{title}</h2>\n{body}\n</section>'


def _header(name: str, results: dict[str, Any]) -> str:
    found = list(rows(results))
    first = [numbers for _, method, numbers in found if method == results["method"]]
    checked, equal = (sum(numbers["lossless"][key] for _, _, numbers in found) for key in ("checked", "equal"))
    over = (
        f"mean of {len(first)} benches" if len(first) > 1 else f"{first[0]['bench']}, T = {first[0]['temperature']:g}"
    )
    ends = first[0]["speedup_ci95"] if len(first) == 1 else None
    spread = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""
    tiles = [
        ("Speedup", f"{_mean(first, 'speedup')}×", over + spread),
        ("Tokens per round", _mean(first, "tokens_per_round_micro"), "tau, bonus token included"),
        ("Tokens per second", _mean(first, "tokens_per_s", 0), f"plain {_mean(first, 'baseline_tokens_per_s', 0)}"),
        ("Equal to plain", f"{equal}/{checked}", "answers, token for token"),
    ]
    drawn = "".join(
        f'<div class="tile"><dt>{escape(title)}</dt><dd><b>{escape(value)}</b><span>{escape(note)}</span></dd></div>'
        for title, value, note in tiles
    )
    facts = [results["target"]["model"], results["method"], results["device"], results["dtype"]]
    chips = "".join(f"<li>{escape(str(fact))}</li>" for fact in facts)
    return (
        f'<header>\n<p class="brand">coral <span>evaluation</span></p>\n<h1>{escape(name)}</h1>\n'
        f'<ul class="chips">{chips}</ul>\n<dl class="tiles">{drawn}</dl>\n</header>'
    )


def _mean(found: Sequence[dict[str, Any]], key: str, digits: int = 2) -> str:
    return number(mean([numbers[key] for numbers in found]), digits=digits)


def _results(results: dict[str, Any]) -> str:
    parts = []
    if len(list(rows(results))) > 1:
        parts.append(_table("Speedup over plain decoding, and tau", comparison(results)))
    parts.append(_table("Every number", details(results)))
    told = "".join(f"<li>{escape(line)}</li>" for line in notes(results))
    meant = "".join(f"<li>{escape(line)}</li>" for line in DEFINITIONS)
    parts.append(f'<ul class="notes">{told}</ul>')
    parts.append(f"<details open><summary>What the numbers mean</summary><ul>{meant}</ul></details>")
    return "\n".join(parts)


def _table(caption: str, content: tuple[list[str], list[list[str]]]) -> str:
    header, body = content
    head = "".join(_cell(name, name, "th", ' scope="col"') for name in header)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(_cell(name, cell) for name, cell in zip(header[1:], row[1:], strict=True))
        + "</tr>"
        for row in body
    )
    caption = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _cell(column: str, text: str, tag: str = "td", more: str = "") -> str:
    words = ' class="words"' if column in ("bench", "method") else ""
    return f"<{tag}{words}{more}>{escape(text)}</{tag}>"


def _legend(names: Sequence[str], kind: str) -> str:
    """Nothing for a single name: the chart says it itself."""
    if len(names) < 2:
        return ""
    items = "".join(f'<li><i class="{kind}{n % 6}"></i>{escape(name)}</li>' for n, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _figures(drawn: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="grid">'
        + "".join(f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" for title, chart in drawn)
        + "</div>"
    )


def _names(results: dict[str, Any]) -> list[str]:
    return [method["method"] for method in methods(results)]


def _acceptance(results: dict[str, Any]) -> str:
    drawn = []
    for bench in results["benches"]:
        series = {
            method["method"]: [(float(n), share) for n, share in enumerate(shares, start=1)]
            for method in methods(results)
            if (shares := method["benches"][bench]["accepted_by_depth"])
        }
        told = "; ".join(f"{name}: {', '.join(f'{share:.0%}' for _, share in line)}" for name, line in series.items())
        chart = svg.lines(series, ("depth", "rounds accepted so far"), f"{bench}, by depth: {told}", percent=True)
        drawn.append((bench, chart))
    return _legend(_names(results), "s") + _figures(drawn) + _numbers("Depths and phases", inside(results))


def _phases(results: dict[str, Any]) -> str:
    drawn = []
    phases: list[str] = []
    for bench in results["benches"]:
        bars = []
        for method in methods(results):
            numbers = method["benches"][bench]
            if numbers["rounds"]:
                parts = {phase: 1e3 * spent / numbers["rounds"] for phase, spent in numbers["seconds_by_phase"].items()}
                phases += [phase for phase in parts if phase not in phases]
                same = 1e3 * numbers["tokens_per_round_micro"] / numbers["baseline_tokens_per_s"]
                bars.append((method["method"], parts, same))
        bars = [(name, {phase: parts.get(phase, 0.0) for phase in phases}, mark) for name, parts, mark in bars]
        told = "; ".join(
            f"{name}: "
            + ", ".join(f"{phase} {spent:.1f} ms" for phase, spent in parts.items())
            + f"; plain decoding {mark:.1f} ms for as many tokens"
            for name, parts, mark in bars
        )
        drawn.append((bench, svg.stacked(bars, f"{bench}, one round: {told}")))
    hint = (
        '<p class="hint">The upright mark: what plain decoding takes for as many tokens. Left of it, drafting pays.</p>'
    )
    return _legend(phases, "p") + _figures(drawn) + hint


def _questions(results: dict[str, Any], charts: dict[str, Any]) -> str:
    drawn = []
    for bench, chart in charts.items():
        slow = {name: sum(value < 1 for value in values.values()) for name, values in chart["speedups"].items()}
        told = "; ".join(f"{name}: {count} of {len(chart['speedups'][name])} below 1" for name, count in slow.items())
        drawn.append((bench, svg.per_question(chart["speedups"], f"{bench}, speedup of each question. {told}")))
    header = ["question", *_names(results)]
    body = [
        [f"{bench}: {question}", *(number(values.get(question), "×") for values in chart["speedups"].values())]
        for bench, chart in charts.items()
        for question in dict.fromkeys(question for values in chart["speedups"].values() for question in values)
    ]
    return _legend(_names(results), "s") + _figures(drawn) + _numbers("Speedup of every question", (header, body))


def _rows_read(results: dict[str, Any]) -> str:
    vocabulary = results["target"]["vocabulary"]
    drawn = []
    for bench in results["benches"]:
        series = {
            method["method"]: (float(method["benches"][bench]["rows_read"]), float(tau))
            for method in methods(results)
            if (tau := method["benches"][bench]["tokens_per_round_micro"])
        }
        told = "; ".join(f"{name}: tau {tau:.2f} at {read:,.0f} rows" for name, (read, tau) in series.items())
        whole = (float(vocabulary), f"the whole head, {vocabulary:,}")
        labels = ("rows of the LM head read per level", "tau")
        drawn.append((bench, svg.points(series, labels, f"{bench}. {told}", limit=whole)))
    hint = '<p class="hint">Several heads in one picture: <code>coral eval --head full --head grouped</code>.</p>'
    return _legend(_names(results), "s") + _figures(drawn) + ("" if results["others"] else hint)


def _training(log: Path | None) -> str:
    lines = _read_log(log) if log else []
    steps = [line for line in lines if line["stage"] == "train"]
    if not steps:
        return '<p class="hint">This run holds no training log: its drafter came ready-made.</p>'
    accuracies = sorted({key for line in steps for key in line if key.startswith("accuracy_")})
    names = [key.replace("accuracy_", "unroll step ") for key in accuracies]
    measured = _curve(lines, "tokens_per_round")
    drawn = [
        _trained("Loss", "weighted sum", {"loss": _curve(steps, "loss")}),
        _trained(
            "Top-1 accuracy of each unroll step",
            "accuracy",
            {name: _curve(steps, key) for name, key in zip(names, accuracies, strict=True)},
        ),
        *([_trained("Tokens per round, held-out prompts", "tau", {"tau": measured})] if measured else []),
    ]
    return _legend(names, "s") + _figures(drawn)


def _trained(title: str, label: str, series: dict[str, list[svg.Point]]) -> tuple[str, str]:
    told = "; ".join(f"{name} ends at {curve[-1][1]:.3g}" for name, curve in series.items())
    chart = svg.lines(series, ("optimizer step", label), f"{title}: {told}", percent=label == "accuracy")
    return title, chart


def _curve(lines: Sequence[dict[str, Any]], key: str) -> list[svg.Point]:
    """(step, value) of the lines that hold the key, thinned evenly; the last one stays."""
    found = [(float(line["step"]), float(line[key])) for line in lines if key in line]
    return found[:: -max(1, len(found) // LOG_POINTS)][::-1]


def _read_log(log: Path) -> list[dict[str, Any]]:
    """The log's lines of the last training; one that an interruption cut is left out."""
    found: list[dict[str, Any]] = []
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"stage", "step"} <= line.keys():
            while found and _again(found[-1], line):
                found.pop()
            found.append(line)
    return found


def _again(before: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether a line says that training began anew, or went on from a checkpoint, no later than an earlier line."""
    earlier, now = before["step"], line["step"]
    return bool(earlier > now or (earlier == now and before["stage"] == line["stage"]))


def _answers(results: dict[str, Any], charts: dict[str, Any]) -> str:
    key = "".join(
        f'<span class="t d{depth}">{"deeper" if depth == DEEPEST else f"depth {depth}"}</span> '
        for depth in range(1, DEEPEST + 1)
    )
    intro = (
        f'<p class="key"><span class="t d0">the target’s own</span> {key}</p>\n'
        '<p><label><input type="checkbox" id="digits"> write the depth behind each drafted token</label></p>\n'
        f'<p class="hint">Drafted by {escape(results["method"])}; '
        "the words are the target’s own, whoever guessed them first.</p>"
    )
    return intro + "".join(_answer(bench, sample) for bench, chart in charts.items() for sample in chart["samples"])


def _answer(bench: str, sample: dict[str, Any]) -> str:
    pieces = sample["pieces"]
    drafted = sum(depth > 0 for _, depth in pieces)
    said = "".join(
        f'<span class="t d{min(depth, DEEPEST)}"'
        + (f' data-d="{depth}" title="drafted at depth {depth}"' if depth else "")
        + f">{escape(text)}</span>"
        for text, depth in pieces
    )
    return (
        f'<article class="answer"><h3>{escape(bench)} <small>question {escape(sample["question"])}</small></h3>'
        f'<blockquote>{escape(sample["prompt"])}</blockquote><p class="said">{said}</p>'
        f'<p class="hint">{drafted} of {len(pieces)} tokens were drafted.</p></article>'
    )


def _numbers(caption: str, content: tuple[list[str], list[list[str]]]) -> str:
    return f"<details><summary>The numbers</summary>{_table(caption, content)}</details>"


def _footer(results: dict[str, Any]) -> str:
    made = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    today = datetime.date.today().isoformat()
    return (
        f"<footer><p><code>{escape(results['command'])}</code></p><p>{escape(made)}; {results['threads']} threads; "
        f"at most {results['max_new_tokens']} new tokens an answer; {today}</p></footer>"
    )
