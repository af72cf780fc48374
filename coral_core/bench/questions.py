"""Question sets: a run's held-out prompts, the benches of the papers, any JSONL file."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from coral_core import embedded, hub
from coral_core.artifacts import check_files
from coral_core.bench.catalogue import PUBLISHED, SPEED_BENCH_MASK
from coral_core.errors import ArtifactError, DataError, did_you_mean

HELD_OUT = "held-out"
BENCHES = (HELD_OUT, *PUBLISHED)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a user says, turn after turn; the answers between are the target's own."""

    name: str
    turns: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    """A prompt that is already tokens, in place of turns."""
    reference: str = ""
    """The written solution that GSM8K gives; its last number is the right answer."""
    tests: str = ""
    """HumanEval's `check(candidate)`, as Python source."""
    entry_point: str = ""
    """The name of the function that `tests` checks."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A named list of questions."""

    name: str
    questions: list[Question]


def check_bench(name: str, known: tuple[str, ...] = BENCHES) -> str:
    """The name itself. Raises DataError naming the nearest bench for an unknown one."""
    if name in known:
        return name
    hint = did_you_mean(name, known)
    raise DataError(f"unknown bench '{name}'; " + f"{hint} the benches are {', '.join(known)}".lstrip())


def check_names(names: list[str], questions: Path | None) -> list[str]:
    """The benches that the names and the questions file or folder mean; nothing is read yet.

    A folder holds BENCH.jsonl for each bench but the run's own held-out prompts. Raises DataError for an unknown or
    repeated bench, for several benches with one file, and for a missing file, saying what to download.
    """
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"bench '{repeated[0]}' is given twice; give each --bench once")
    if questions is None:
        return [check_bench(name) for name in names] or [HELD_OUT]
    if questions.is_dir():
        found = tuple(sorted(path.stem for path in questions.glob("*.jsonl")))
        for name in names:
            if name in PUBLISHED and name not in found:
                raise DataError(f"the questions of {name} are missing; {_where_to_get(name, questions)}")
        return [check_bench(name, (HELD_OUT, *found)) for name in names] or list(found)
    if len(names) > 1:
        raise DataError(
            f"{questions} is one file and {len(names)} benches are asked; give a folder with BENCH.jsonl each"
        )
    name = names[0] if names else questions.stem
    if not questions.exists():
        hint = (
            f"; {_where_to_get(name, questions.parent)}" if name in PUBLISHED else ". Pass a JSONL file to --questions"
        )
        raise DataError(f"the questions file {questions} is missing{hint}")
    return [name]


def load_bench(name: str, questions: Path | None, run: Path, model: str) -> Bench:
    """The questions of a bench: from the file, or the folder's file, or the run, or the Hub."""
    if questions is not None and questions.is_dir():
        questions = None if name == HELD_OUT else questions / f"{name}.jsonl"
    if questions is not None:
        return Bench(name, from_file(questions))
    return Bench(name, held_out(run, model) if name == HELD_OUT else from_hub(name))


def from_hub(bench: str) -> list[Question]:
    """A bench of the papers. Raises DataError saying what to download when the Hub cannot be reached."""
    import datasets

    source = PUBLISHED[bench]
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # without a network it tells of each retry, and the failure is told below
    try:
        with hub.offline_where_absent():
            rows = datasets.load_dataset(
                source.dataset, source.configuration, data_files=source.file, split=source.split
            )
    except Exception as error:  # the Hub client raises many kinds; the reason is passed on
        raise DataError(
            f"cannot fetch {bench} from the Hub dataset {source.dataset} ({type(error).__name__}); "
            f"{_where_to_get(bench, Path('questions'))}"
        ) from error
    finally:
        client.setLevel(level)
    asked = [_question(row, f"{bench}-{index}", bench) for index, row in enumerate(rows)]
    return [question for question in asked if not _masked(question)]


def _masked(question: Question) -> bool:
    """Whether SPEED-Bench keeps the words of this row to itself."""
    return any(SPEED_BENCH_MASK in turn for turn in question.turns)


def _where_to_get(bench: str, folder: Path) -> str:
    """What to download, where to put it, and the command."""
    source = PUBLISHED[bench]
    what = source.file or f"the {source.split} split"
    return (
        f"download {what} of https://huggingface.co/datasets/{source.dataset} elsewhere, one JSON object per line, "
        f"to {folder / bench}.jsonl, and run: coral eval --bench {bench} --questions {folder}"
    )


def from_file(path: Path) -> list[Question]:
    """One question per line: `turns`, `prompt` or `question`. Raises DataError naming the line that is not one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a line of JSON may hold what splitlines breaks at
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the questions file {path}: {error}. Pass a JSONL file to --questions") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line), f"{path.stem}-{number}", path.stem))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} line {number} is not a question: it needs 'turns', 'prompt' or 'question' ({error})"
            ) from error
    if not questions:
        raise DataError(f"the questions file {path} is empty. Pass a JSONL file to --questions")
    return [question for question in questions if not _masked(question)]


def _question(row: dict[str, Any], name: str, bench: str) -> Question:
    """A row of `bench`, whose template is used where the bench has one and the row its fields."""
    if not isinstance(row, dict):
        raise TypeError("not a JSON object")
    templated = PUBLISHED[bench].words(row) if bench in PUBLISHED else None
    turns = templated or row.get("turns") or row.get("prompt") or row.get("question")
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns:
        raise ValueError("it has no turn that is text")
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("a turn is empty or not text")
    tests, entry_point = row.get("test"), row.get("entry_point")
    return Question(
        str(row.get("question_id", row.get("task_id", name))),
        tuple(turns),
        reference=_reference(row.get("answer") or row.get("reference")),
        tests=str(tests) if tests and entry_point else "",
        entry_point=str(entry_point) if tests and entry_point else "",
    )


def _reference(given: Any) -> str:
    """GSM8K's solution, which marks its number with ####; other references are no number to compare with."""
    text = given[0] if isinstance(given, list) and given else given
    return text if isinstance(text, str) and "####" in text else ""


def held_out(run: Path, model: str) -> list[Question]:
    """The prompts that a run's drafter was never trained on; for a drafter that coral ships, those beside it.

    Raises ArtifactError when the run has none.
    """
    path = run / "data" / "holdout.json"
    check_files(path.parent, [path.name], "coral prepare-data, or name a --bench")
    if (own := embedded.made_in(run, model, "data/holdout.json")) != run:
        path = own / "holdout.json"
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"no held-out prompts in {path.parent}. Run: coral prepare-data, or name a --bench"
        ) from error
    if not prompts:
        raise ArtifactError(f"{path} is empty: data.holdout was 0. Name a --bench, or raise data.holdout")
    return [Question(f"{HELD_OUT}-{index}", ids=tuple(prompt)) for index, prompt in enumerate(prompts)]
