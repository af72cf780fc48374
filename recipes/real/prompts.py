"""What the drafters of real models learn from: questions of the corpora, for the target to answer.

    python -m recipes.real.prompts --corpora DIR --benchmarks DIR --to runs/real-prompts.jsonl
    coral prepare-data recipes/smollm2-135m.yaml data.prompts=runs/real-prompts.jsonl

--corpora holds a NAME.jsonl.gz for each of COUNTS, a dialogue a line, {"messages": [...]}; --benchmarks the files whose
questions must not occur, BENCH.jsonl. Only the users' words are taken: the answers are the target's. A dialogue that
shares ten words in a row with a benchmark question or its answer is left out. HumanEval shows a function's head and its
docstring; no corpus asks that way, so half of MBPP's tasks are asked in that form.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from coral_core.artifacts import write_text
from coral_core.errors import DataError
from recipes.pico import corpora
from recipes.pico.prompts import user_turns

COUNTS = {
    "gsm8k_train": 1300,
    "gpteacher_codegen": 1100,
    "arena_open_models": 900,
    "medquad": 500,
    "gpteacher_roleplay": 400,
    "mbpp_train_val": 400,
    "tldr": 300,
    "self_dialogue": 250,
    "fairytale_stories": 150,
    "flan_cot_aqua": 150,
    "flan_cot_strategyqa": 150,
}
"""Prompts of each corpus, at most: sums, code, explanations, chat."""
LONGEST_CHARACTERS = 1000
"""Of the user's words: the rest of a row of 512 tokens is for the answers."""
SIGNATURE = re.compile(r"^def \w+\(.*\):\s*$", re.MULTILINE)


def stub(dialogue: list[dict[str, str]]) -> str | None:
    """An MBPP task as HumanEval would ask it: the answer's function head, and the task as its docstring."""
    asked, answer = dialogue[0]["content"], dialogue[1]["content"]
    heads = SIGNATURE.findall(answer)
    if not heads:
        return None
    task, _, tests = asked.partition("Your code should pass these tests:")
    lines = [f"    {line.strip()}" for line in [task, *tests.strip().splitlines()[:2]]]
    return "\n".join([heads[-1].rstrip(), f'    """{lines[0].strip()}', *lines[1:], '    """', ""])


def questions(source: str, dialogues: list[list[dict[str, str]]]) -> list[list[str]]:
    """The user's turns of each dialogue; every other one of MBPP as a stub."""
    asked = []
    for number, dialogue in enumerate(dialogues):
        stubbed = stub(dialogue) if source == "mbpp_train_val" and number % 2 else None
        turns = [stubbed] if stubbed else user_turns(dialogue)
        if turns and len("".join(turns)) <= LONGEST_CHARACTERS:
            asked.append(turns)
    return asked


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
        asked = questions(source, clean)
        chosen = rng.permutation(len(asked))[:count]
        rows += [{"turns": asked[i]} for i in chosen]
        left_out = f"{len(whole) - len(clean)} of {len(whole)} dialogues left out"
        print(f"{source}: {len(chosen)} of {len(asked)} prompts; {left_out}")
    options.to.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.to, "".join(json.dumps(rows[i]) + "\n" for i in rng.permutation(len(rows))))


if __name__ == "__main__":
    main()
