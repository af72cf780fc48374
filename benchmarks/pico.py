"""The README's table: the embedded pico with its drafter and head, on held-out prompts and the papers' benches.

    python -m benchmarks.pico --questions DIR     DIR holds mt-bench.jsonl, humaneval-80.jsonl, gsm8k-80.jsonl

Runs one `coral eval`, with plain decoding in the same process, and writes results/pico.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import record

SHOWN = [
    "bench",
    "questions",
    "tokens_per_round_micro",
    "tokens_per_round_macro",
    "tokens_per_s",
    "baseline",
    "baseline_tokens_per_s",
    "speedup",
    "speedup_ci95",
    "accepted_by_depth",
    "lossless",
    "seconds_by_phase",
    "temperature",
    "new_tokens",
    "rounds",
    "plain_tokens_per_s",
    "prefill_s",
    "plain_decoders",
    "speedup_mean",
    "speedup_mean_ci95",
    "rows_read",
    "distribution",
    "answers",
]
BENCHES = ("held-out", "mt-bench", "humaneval-80", "gsm8k-80")


def evaluate(arguments: list[str]) -> dict[str, Any]:
    """One `coral eval --json`, in a folder of its own."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "coral_cli.main", "eval", "--json", "--runs", runs, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    options = parser.parse_args()
    asked = ["--questions", str(options.questions), "--limit", str(options.limit)]
    asked += [f"--bench={bench}" for bench in BENCHES]
    rows = []
    for temperature in (0, 1):
        results = evaluate([f"decode.temperature={temperature}", *asked])
        rows += [
            {key: numbers[key] for key in SHOWN} | {"tree": results["tree"]} for numbers in results["benches"].values()
        ]
    greedy = [row for row in rows if row["temperature"] == 0]
    figures = {
        "tau": {row["bench"]: row["tokens_per_round_micro"] for row in greedy},
        "speedup": {row["bench"]: row["speedup"] for row in greedy},
        "speedup_ci95": {row["bench"]: row["speedup_ci95"] for row in greedy},
        "lossless": all(row["lossless"]["equal"] == row["lossless"]["checked"] for row in rows),
    }
    print(record("pico", figures, rows))


if __name__ == "__main__":
    main()
