"""The numbers of an evaluation as tables: Markdown to read, LaTeX for a paper. Reads results.json's object only."""

from collections.abc import Iterator, Sequence
from typing import Any

DEFINITIONS = (
    "tau: tokens per round, bonus token included; micro = all tokens / all rounds, macro = mean over questions.",
    "tokens/s: tokens after the first / seconds after the prefill; the prefill is reported apart.",
    "plain: of the plain decoders (coral's own loop and `model.generate`, in float32 and bfloat16 where there is room "
    "for both), the one that was fastest over all questions; none is compiled. All run in the same process and take "
    "turns with the drafted ones on every question, after an uncounted answer of each.",
    "speedup: tokens/s over plain tokens/s, both over the whole bench (ratio of totals); per question: the mean of "
    "each question's own ratio. In brackets: bootstrap 95 % intervals over questions.",
    "lossless: answers whose drafted ids equal plain decoding's with the same seed, token for token.",
    "depth n: share of rounds whose first n drafted tokens were all accepted.",
)
ABSENT = "-: nothing to divide: no answer of that bench has a second token, or none fits the context."
DIFFERS = 0.05
"""Micro and macro tau that differ by so much are explained."""


def methods(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every method's {method, drafter, head, tree, benches}."""
    return [results, *results["others"]]


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(bench, method, numbers) bench by bench."""
    for bench in results["benches"]:
        for method in methods(results):
            yield bench, method["method"], method["benches"][bench]


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column and methods to the left, the others to the right."""
    widths = [max(3, *(len(row[column]) for row in (header, *body))) for column in range(len(header))]
    words = [not n or name == "method" for n, name in enumerate(header)]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, words, strict=True)
        return f"| {' | '.join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in columns)} |"

    rule = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, words, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, body)])


def markdown(results: dict[str, Any]) -> str:
    """The paper's table where there is something to compare, every number, the acceptance, and the definitions."""
    parts = []
    if len(list(rows(results))) > 1:
        parts.append(table(*comparison(results)))
    parts += [table(*details(results)), table(*inside(results))]
    absent = [ABSENT] if any(" - |" in part for part in parts) else []
    parts += ["\n".join([*DEFINITIONS, *absent]), "\n".join(notes(results))]
    return "\n\n".join(parts) + "\n"


def comparison(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The paper's table: a row per temperature and method, speedup and tau of each bench, and their means."""
    benches = list(dict.fromkeys(numbers["bench"] for _, _, numbers in rows(results)))
    header = ["method", "T", *(f"{bench} {what}" for bench in benches for what in ("speedup", "tau"))]
    several = len(benches) > 1
    body = []
    for temperature in dict.fromkeys(numbers["temperature"] for _, _, numbers in rows(results)):
        for method in methods(results):
            at = {
                numbers["bench"]: numbers
                for numbers in method["benches"].values()
                if numbers["temperature"] == temperature
            }
            pairs = [(at[bench]["speedup"], at[bench]["tokens_per_round_micro"]) for bench in benches]
            pairs += [(mean([pair[0] for pair in pairs]), mean([pair[1] for pair in pairs]))] if several else []
            cells = [cell for speedup, tau in pairs for cell in (number(speedup, "x"), number(tau))]
            body.append([method["method"], f"{temperature:g}", *cells])
    return header + (["mean speedup", "mean tau"] if several else []), body


def details(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Every number of every bench and method; columns in which nothing differs or is known are left out."""
    header = ["bench", "method", "questions", "tau micro", "tau macro", "tokens/s", "plain tokens/s", "speedup"]
    header += ["speedup per question", "lossless", "right answers", "right, plain"]
    body = []
    for bench, method, numbers in rows(results):
        lossless, answers = numbers["lossless"], numbers["answers"]
        right = [f"{answers[lane]}/{answers['checked']}" if answers else "" for lane in ("speculative", "plain")]
        body.append(
            [
                bench,
                method,
                str(numbers["questions"]),
                number(numbers["tokens_per_round_micro"]),
                number(numbers["tokens_per_round_macro"]),
                number(numbers["tokens_per_s"], digits=1),
                f"{number(numbers['baseline_tokens_per_s'], digits=1)} ({numbers['baseline']})",
                interval(numbers["speedup"], numbers["speedup_ci95"]),
                interval(numbers["speedup_mean"], numbers["speedup_mean_ci95"]),
                f"{lossless['equal']}/{lossless['checked']}",
                *right,
            ]
        )
    return _without_empty(header, body, keep_method=bool(results["others"]))


def inside(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """How deep drafts are accepted, what a round costs by phase, and the prefill, in milliseconds."""
    found = list(rows(results))
    deepest = max((len(numbers["accepted_by_depth"]) for _, _, numbers in found), default=0)
    phases = list(dict.fromkeys(phase for _, _, numbers in found for phase in numbers["seconds_by_phase"]))
    header = ["bench", "method", *(f"depth {depth}" for depth in range(1, deepest + 1))]
    header += [*(f"{phase}, ms/round" for phase in phases), "prefill, ms/turn", "plain prefill"]
    body = []
    for bench, method, numbers in found:
        accepted = numbers["accepted_by_depth"]
        shares = [f"{accepted[n]:.0%}" if n < len(accepted) else "0%" for n in range(deepest)]
        spent = [_per(numbers["seconds_by_phase"].get(phase, 0.0), numbers["rounds"]) for phase in phases]
        prefill = [_per(numbers[key], numbers["turns"]) for key in ("prefill_s", "baseline_prefill_s")]
        body.append([bench, method, *shares, *spent, *prefill])
    return _without_empty(header, body, keep_method=bool(results["others"]))


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table: plain decoders tried, differences, the check of the distribution."""
    found = []
    for bench, method, numbers in rows(results):
        if method == results["method"]:
            tried = ", ".join(f"{name} {speed:.1f}" for name, speed in numbers["plain_decoders"].items())
            found.append(f"{bench}: plain decoders on every question, tokens/s: {tried}.")
            if numbers["turns_too_long"]:
                found.append(f"{bench}: {numbers['turns_too_long']} turns do not fit the target's context; left out.")
        if text := _two_means(numbers["tokens_per_round_micro"], numbers["tokens_per_round_macro"]):
            found.append(f"{bench}, {method}: {text}")
        if plain := numbers.get("plain_rounds"):
            count = f"{plain} of {numbers['rounds']} rounds"
            found.append(f"{bench}, {method}: {count} were plain steps: drafting did not pay there.")
        if copied := numbers.get("copied_rounds"):
            count = f"{copied} of {numbers['rounds']} rounds"
            found.append(f"{bench}, {method}: {count} drafted a copy of the text, without the drafter.")
        if check := numbers["distribution"]:
            verdict = "as the target's distribution wants" if check["ok"] else "NOT the target's distribution"
            found.append(
                f"{bench}, {method}: {check['tokens']} tokens of short continuations fall {verdict} "
                f"(chi-square {check['chi2']:.1f} over {len(check['bins'])} bins, p = {check['p_value']:.3f})."
            )
        if first := numbers["lossless"]["first_divergence"]:
            found.append(f"{bench}, {method}: {_difference(numbers['lossless'], first, results['dtype'])}")
    return found


def _two_means(micro: float | None, macro: float | None) -> str:
    """Why they differ; '' where they hardly do."""
    if micro is None or macro is None or abs(micro - macro) < DIFFERS:
        return ""
    more = "more" if micro > macro else "fewer"
    return (
        f"tau is {micro:.2f} micro and {macro:.2f} macro, since answers of many rounds accept {more} tokens a round "
        "here; micro counts every round alike, macro every question."
    )


def _difference(lossless: dict[str, Any], first: dict[str, Any], dtype: str) -> str:
    count = lossless["checked"] - lossless["equal"]
    text = f"{count} answers differ from plain, {lossless['ties']} of them at a tie that rounding in {dtype} decides; "
    text += f"the first is question {first['question']}, turn {first['turn'] + 1}, token {first['position'] + 1}"
    if "logit_gap" not in first:
        return f"{text}: {first['reason']}."
    gap = f"tokens {first['plain']} (plain) and {first['speculative']} are {first['logit_gap']:.2g} apart"
    text += f": {gap}, and rounding moves that by {first['rounding']:.2g}"
    if operation := first.get("operation"):
        return f"{text}. The first operation that rounds otherwise with other rows beside it is {operation}."
    return f"{text}. No operation rounds otherwise with other rows beside it: this is a bug of coral, please report it."


def latex(results: dict[str, Any]) -> str:
    """The paper's table with booktabs."""
    header, body = comparison(results)
    benches = [name.removesuffix(" tau") for name in header[3::2]]
    top = " & ".join(["", "", *(rf"\multicolumn{{2}}{{c}}{{{_tex(bench)}}}" for bench in benches)])
    lines = [
        "% \\usepackage{booktabs}",
        rf"\begin{{tabular}}{{ll{'rr' * len(benches)}}}",
        r"\toprule",
        top + r" \\",
        " & ".join(["Method", "$T$", *["Speedup", r"$\tau$"] * len(benches)]) + r" \\",
        r"\midrule",
        *(
            " & ".join(_tex(cell).replace("x", r"$\times$") if n > 1 else _tex(cell) for n, cell in enumerate(row))
            + r" \\"
            for row in body
        ),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(named.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def number(value: float | None, unit: str = "", digits: int = 2) -> str:
    """'1.23x', or '-' where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def interval(value: float | None, ends: Sequence[float] | None) -> str:
    """'1.23x [1.10, 1.31]'."""
    return number(value, "x") + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")


def _per(seconds: float, count: int) -> str:
    return f"{1e3 * seconds / count:.1f}" if count else "-"


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _without_empty(header: list[str], body: list[list[str]], *, keep_method: bool) -> tuple[list[str], list[list[str]]]:
    keep = [n for n, name in enumerate(header) if any(row[n] for row in body) and (name != "method" or keep_method)]
    return [header[n] for n in keep], [[row[n] for n in keep] for row in body]
