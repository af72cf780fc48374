"""Question sets: the three of the papers, a run's held-out prompts, or any JSONL file."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from coral_core.errors import ArtifactError, DataError
from coral_core.target.load import PICO

HUB: dict[str, tuple[str, str | None, str]] = {
    "mt-bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
"""Bench -> Hub dataset, configuration, split."""
HELD_OUT = "held-out"
BENCHES = (HELD_OUT, *HUB)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a user says, turn after turn; the answers between are the target's own."""

    name: str
    turns: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    """A prompt that is already tokens, in place of turns."""


def check_bench(name: str) -> str:
    """The name itself. Raises DataError naming the nearest bench for an unknown one."""
    if name in BENCHES:
        return name
    near = difflib.get_close_matches(name, BENCHES, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise DataError(f"unknown bench '{name}'; {hint}The benches are {', '.join(BENCHES)}")


def from_hub(bench: str) -> list[Question]:
    """A bench of the papers. Raises DataError saying what to download when the Hub cannot be reached."""
    import datasets

    dataset, configuration, split = HUB[bench]
    try:
        rows = datasets.load_dataset(dataset, configuration, split=split)
    except Exception as error:  # the Hub client raises many kinds; the reason is passed on
        raise DataError(
            f"cannot fetch {bench} from the Hub dataset {dataset} ({type(error).__name__}); "
            f"download its questions as JSONL elsewhere and pass the file: coral eval --bench {bench} --questions FILE"
        ) from error
    return [_question(row, f"{bench}-{index}") for index, row in enumerate(rows)]


def from_file(path: Path) -> list[Question]:
    """One question per line: `turns`, `prompt` or `question`. Raises DataError naming the line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the questions file {path}: {error}. Pass a JSONL file to --questions") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line), f"{path.stem}-{number}"))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} line {number} is not a question: it needs 'turns', 'prompt' or 'question' ({error})"
            ) from error
    if not questions:
        raise DataError(f"the questions file {path} is empty. Pass a JSONL file to --questions")
    return questions


def _question(row: dict[str, Any], name: str) -> Question:
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    turns = row.get("turns") or row.get("prompt") or row["question"]
    turns = (turns,) if isinstance(turns, str) else tuple(turns)
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("a turn is empty or not text")
    return Question(str(row.get("question_id", row.get("task_id", name))), turns)


def held_out(run: Path, model: str) -> list[Question]:
    """The prompts that a run's drafter was never trained on; for the embedded pico, the ones that coral ships.

    Raises ArtifactError when the run has none.
    """
    path = run / "data" / "holdout.json"
    if not path.exists() and model == "pico":
        path = PICO / "holdout.json"
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"no held-out prompts in {path.parent}. Run: coral prepare-data, or name a --bench"
        ) from error
    if not prompts:
        raise ArtifactError(f"{path} is empty: data.holdout was 0. Name a --bench, or raise data.holdout")
    return [Question(f"{HELD_OUT}-{index}", ids=tuple(prompt)) for index, prompt in enumerate(prompts)]
