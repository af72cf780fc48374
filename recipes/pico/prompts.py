"""What people asked in the corpora, for pico to answer: the prompts that its drafter learns from.

    python -m recipes.pico.prompts --corpora DIR --benchmarks DIR --to runs/pico-prompts.jsonl
    coral prepare-data data.prompts=runs/pico-prompts.jsonl=4,self=1

Prompts that pico writes itself (`self`) are short, and so are its answers to them: 23 tokens on average, with next to
no sums or code. A drafter is measured on what users ask, so it learns from that too. Only the users' words are taken,
the answers are pico's; what shares ten words in a row with a benchmark question is left out, and so is what pico's
own held-out split holds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from coral_core.artifacts import write_text
from coral_core.errors import DataError
from recipes.pico import corpora

COUNTS = {
    "gsm8k_train": 900,
    "arena_open_models": 600,
    "self_dialogue": 400,
    "sgd": 400,
    "tldr": 400,
    "medquad": 350,
    "mbpp_train_val": 350,
    "fairytale_stories": 200,
    "flan_cot_creak": 150,
    "flan_cot_ecqa": 150,
    "flan_cot_strategyqa": 150,
    "taskmaster4": 150,
    "flan_cot_aqua": 100,
    "flan_cot_qasc": 100,
}
"""Prompts of each corpus. The arena's prompts are people's own words, though its answers, which pico did not learn
from, are other models'."""
TURNS = 2
"""Of the user, at most: MT-bench's number."""
LONGEST_CHARACTERS = 1000
"""Of the user's words: the rest of a row of 512 tokens is for the answers."""


def user_turns(dialogue: list[dict[str, str]]) -> list[str]:
    """The user's first words of a dialogue."""
    return [message["content"] for message in dialogue if message["role"] == "user"][:TURNS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--benchmarks", type=Path, required=True, help="JSONL files whose questions are left out")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    try:
        forbidden = corpora.benchmark_ngrams(options.benchmarks)
    except DataError as error:
        sys.exit(f"error: {error}")
    rows: list[dict[str, list[str]]] = []
    for source, count in COUNTS.items():
        whole = corpora.read(options.corpora, source)
        clean = corpora.clean(whole, forbidden)
        dialogues, _ = corpora.split(clean)
        asked = [turns for turns in map(user_turns, dialogues) if turns and len("".join(turns)) <= LONGEST_CHARACTERS]
        chosen = rng.permutation(len(asked))[:count]
        rows += [{"turns": asked[i]} for i in chosen]
        left_out = f"{len(whole) - len(clean)} of {len(whole)} dialogues left out"
        print(f"{source}: {len(chosen)} of {len(asked)} prompts; {left_out}")
    options.to.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.to, "".join(json.dumps(rows[i]) + "\n" for i in rng.permutation(len(rows))))


if __name__ == "__main__":
    main()
