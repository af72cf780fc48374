"""An evaluation's results and chart data, made up, in the form that `coral eval` hands to the report."""

import copy
import json
import random
from pathlib import Path
from typing import Any

ANSWER = (
    "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18 every day at the farmer's market. "
    "She <b>keeps</b> three & bakes with four. #### 18"
)
NUMBERS: dict[str, Any] = {
    "bench": "gsm8k",
    "temperature": 0.0,
    "seed": 0,
    "baseline": "plain bfloat16",
    "plain_decoders": {"plain bfloat16": 104.4, "generate float32": 73.2},
    "questions": 24,
    "turns": 24,
    "new_tokens": 1800,
    "rounds": 600,
    "tokens_per_round_micro": 3.0,
    "tokens_per_round_macro": 3.1,
    "accepted_by_depth": [0.88, 0.66, 0.41, 0.22, 0.1, 0.04],
    "tokens_per_s": 142.0,
    "baseline_tokens_per_s": 104.0,
    "plain_tokens_per_s": 96.0,
    "speedup": 1.365,
    "speedup_ci95": [1.21, 1.49],
    "speedup_mean": 1.38,
    "speedup_mean_ci95": [1.22, 1.52],
    "lossless": {"checked": 24, "equal": 24, "ties": 0, "first_divergence": None},
    "prefill_s": 0.48,
    "baseline_prefill_s": 0.43,
    "seconds_by_phase": {"draft": 3.6, "head": 1.8, "verify": 6.6, "accept": 0.1, "other": 0.1},
    "turns_too_long": 0,
    "rows_read": 2048.0,
    "answers": {"metric": "exact match", "checked": 24, "plain": 7, "speculative": 7},
    "distribution": None,
}


def results(benches: int = 1, methods: int = 1) -> dict[str, Any]:
    """The object of results.json; more methods and benches are copies with other numbers."""
    found: list[dict[str, Any]] = []
    for place in range(methods):
        kind = ("grouped", "full", "static")[place % 3]
        sections = {}
        for name in ("gsm8k", "mt-bench", "humaneval", "held-out")[:benches]:
            numbers = copy.deepcopy(NUMBERS) | {"bench": name, "rows_read": (2048.0, 8192.0, 2048.0)[place % 3]}
            for key in ("speedup", "speedup_mean", "tokens_per_s", "tokens_per_round_micro", "tokens_per_round_macro"):
                numbers[key] *= 1 - 0.07 * place - 0.03 * len(sections)
            numbers["accepted_by_depth"] = [share ** (1 + 0.1 * place) for share in numbers["accepted_by_depth"]]
            sections[name] = numbers
        found.append(
            {
                "method": f"{('coral', 'hass')[place // 3 % 2]} {kind}",
                "drafter": {"run": "coral", "preset": "coral", "fingerprint": "7668fd723008b6f6"},
                "head": {"kind": kind, "groups": 32, "active": 8},
                "tree": {"depth": 6, "nodes": 10, "topk": 4, "confidence": 0.05},
                "benches": sections,
            }
        )
    return {
        "schema": 1,
        "target": {"model": "my-org/my-model", "fingerprint": "933529733312d553", "vocabulary": 8192},
        "device": "AMD EPYC 7763 x 2",
        "dtype": "float32",
        "threads": 2,
        "max_new_tokens": 128,
        "command": "coral eval my.yaml --bench gsm8k",
        "versions": {"coral": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        **found[0],
        "others": found[1:],
    }


def charts(of: dict[str, Any]) -> dict[str, Any]:
    """Speedups by question, and one answer cut in pieces, for every bench of the results."""
    draw = random.Random(0)
    names = [of["method"], *(method["method"] for method in of["others"])]
    words = ANSWER.split(" ")
    pieces = [
        (word + " ", 0 if place % 4 == 0 else place % 4 + (3 if place % 8 > 4 else 0))
        for place, word in enumerate(words)
    ]
    return {
        bench: {
            "speedups": {
                name: {f"{number}": draw.gauss(1.35 - 0.1 * place, 0.22) for number in range(24)}
                for place, name in enumerate(names)
            },
            "samples": [
                {"question": "17", "prompt": "Janet’s ducks lay 16 eggs per day. <How> much?", "pieces": pieces}
            ],
        }
        for bench in of["benches"]
    }


def write_log(path: Path, steps: int = 600) -> Path:
    """A drafter's training, as log.jsonl keeps it, with a last line that an interruption cut."""
    draw = random.Random(1)
    lines = []
    for step in range(10, steps + 1, 10):
        left = 1 / (1 + step / 90)
        accuracies = {f"accuracy_{n}": 0.85 - 0.05 * n - 0.5 * left + draw.gauss(0, 0.006) for n in (1, 2, 3)}
        lines.append({"stage": "train", "step": step, "loss": 1.5 + 5 * left + draw.gauss(0, 0.03), **accuracies})
    lines.append({"stage": "acceptance", "step": steps, "tokens_per_round": 3.0})
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "train", "st', encoding="utf-8")
    return path
